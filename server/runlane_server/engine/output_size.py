"""The size of what agents emit."""

from __future__ import annotations

from runlane_server.core.model import (
    EventBody,
    ReasoningDelta,
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
        case _:
            return 0
