"""The size of what agents emit."""

from __future__ import annotations

from runlane_server.core.artifact import ArtifactPiece
from runlane_server.core.model import (
    CustomEvent,
    EventBody,
    ReasoningDelta,
    StepResult,
    TextDelta,
    ToolCall,
    ToolResult,
    utf8_size,
)


def output_size(body: EventBody) -> int:
    """The size of an agent's event, in bytes of UTF-8."""
    match body:
        case TextDelta(text) | ReasoningDelta(text):
            return utf8_size(text)
        case ToolCall(call_id, name, content) | ToolResult(call_id, name, content):
            return utf8_size(call_id) + utf8_size(name) + utf8_size(content)
        case ArtifactPiece(artifact_id, name, mime_type):
            return sum(map(utf8_size, (artifact_id, name, mime_type))) + body.size
        case CustomEvent(name, json) | StepResult(name, json):
            return utf8_size(name) + utf8_size(json)
        case _:
            return 0
