"""The events of a run as those of AG-UI 1.0 (https://docs.ag-ui.com)."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from runlane.inputs import InputKind, InputRequest
from runlane.types import (
    Artifact,
    Custom,
    ReasoningDelta,
    RunComplete,
    RunEvent,
    RunState,
    Started,
    Step,
    TextDelta,
    ToolCall,
    ToolResult,
)

Event: TypeAlias = dict[str, Any]

APPROVAL_SCHEMA = {
    "type": "object",
    "properties": {
        "approved": {"type": "boolean"},
        "reason": {"type": "string"},
        "questionDigest": {"type": "string"},
    },
    "required": ["approved"],
}


@dataclass(slots=True)
class Rendering:
    """Renders one stream. A message is open from its first piece until something else comes.

    Attributes:
        thread_id: The session.
        run_id: The run as the caller names it: an answer is a new run to AG-UI, and the same to us.
    """

    thread_id: str
    run_id: str
    _messages: int = 0
    _open: str = ""

    def begin(self) -> Event:
        """The first event."""
        return {"type": "RUN_STARTED", **self._ids(), "protocolVersion": "1.0"}

    def render(self, event: RunEvent) -> list[Event]:  # noqa: PLR0911 - one for each kind
        """The events for an event that is neither a question nor the end."""
        match event.body:
            case TextDelta(text):
                return self._piece("TEXT_MESSAGE", text, "assistant")
            case ReasoningDelta(text):
                return self._piece("REASONING_MESSAGE", text, "reasoning")
            case ToolCall(key, name, arguments):
                return [*self.close(), *_call(key, name, arguments)]
            case ToolResult(key, _, content):
                message_id = f"{self.run_id}:result:{key}"
                found = {"messageId": message_id, "toolCallId": key, "content": content}
                return [*self.close(), {"type": "TOOL_CALL_RESULT", **found, "role": "tool"}]
            case Artifact() as artifact:
                return [*self.close(), _custom("runlane.artifact", _artifact(artifact))]
            case Custom(kind, value):
                return [*self.close(), _custom(kind, json.loads(value))]
            case Step(key, _):
                step = {"stepName": key}
                begun = {"type": "STEP_STARTED", **step}
                return [*self.close(), begun, {"type": "STEP_FINISHED", **step}]
            case Started(attempt) if attempt > 1:
                return [*self.close(), _custom("runlane.attempt", attempt)]
            case _:
                return []

    def ask(self, requests: Iterable[InputRequest]) -> list[Event]:
        """The events that end a stream with questions."""
        interrupts = [_interrupt(request) for request in requests]
        outcome = {"type": "interrupt", "interrupts": interrupts}
        return [*self.close(), {"type": "RUN_FINISHED", **self._ids(), "outcome": outcome}]

    def end(self, complete: RunComplete) -> list[Event]:
        """The events that end a stream with the run."""
        if complete.state is RunState.FAILED:
            error = complete.error
            return [*self.close(), failed(error.message, error.reason) if error else failed("", "")]
        kind = "cancelled" if complete.cancelled else "success"
        last: Event = {"type": "RUN_FINISHED", **self._ids(), "outcome": {"type": kind}}
        if complete.result is not None:
            last["result"] = json.loads(complete.result)
        return [*self.close(), last]

    def close(self) -> list[Event]:
        """The events that end the open message."""
        if not self._open:
            return []
        kind, self._open = self._open, ""
        ends = [{"type": f"{kind}_END", "messageId": self._message_id}]
        if kind == "REASONING_MESSAGE":
            ends.append({"type": "REASONING_END", "messageId": self._message_id})
        return ends

    @property
    def _message_id(self) -> str:
        return f"{self.run_id}:{self._messages}"

    def _ids(self) -> Event:
        return {"threadId": self.thread_id, "runId": self.run_id}

    def _piece(self, kind: str, text: str, role: str) -> list[Event]:
        events: list[Event] = []
        if self._open != kind:
            events += self.close()
            self._open = kind
            self._messages += 1
            if kind == "REASONING_MESSAGE":
                events.append({"type": "REASONING_START", "messageId": self._message_id})
            start = {"type": f"{kind}_START", "messageId": self._message_id, "role": role}
            events.append(start)
        if text:
            piece = {"type": f"{kind}_CONTENT", "messageId": self._message_id, "delta": text}
            events.append(piece)
        return events


def failed(message: str, code: str) -> Event:
    """The event of a failure."""
    return {"type": "RUN_ERROR", "message": message, "code": code}


def _call(key: str, name: str, arguments: str) -> list[Event]:
    return [
        {"type": "TOOL_CALL_START", "toolCallId": key, "toolCallName": name},
        {"type": "TOOL_CALL_ARGS", "toolCallId": key, "delta": arguments},
        {"type": "TOOL_CALL_END", "toolCallId": key},
    ]


def _custom(name: str, value: Any) -> Event:
    return {"type": "CUSTOM", "name": name, "value": value}


def _artifact(artifact: Artifact) -> dict[str, Any]:
    content = artifact.content
    return {
        "artifactId": artifact.artifact_id,
        "name": artifact.name,
        "mimeType": artifact.mime_type,
        "kind": artifact.kind.value,
        "content": base64.b64encode(content).decode() if isinstance(content, bytes) else content,
        "append": artifact.append,
        "last": artifact.last,
    }


def _interrupt(request: InputRequest) -> dict[str, Any]:
    metadata: dict[str, Any] = {"questionDigest": request.question_digest}
    made: dict[str, Any] = {
        "id": request.input_request_id,
        "reason": f"runlane:{request.kind.value}",
        "message": request.text,
        "metadata": metadata,
    }
    if request.kind is InputKind.APPROVAL:
        metadata |= {"toolName": request.tool_name, "argumentsJson": request.arguments_json}
        made["responseSchema"] = APPROVAL_SCHEMA
    elif request.kind is InputKind.FORM:
        made["responseSchema"] = json.loads(request.schema_json)
    elif request.choices:
        made["responseSchema"] = {"type": "string", "enum": list(request.choices)}
    if request.expires_at is not None:
        made["expiresAt"] = request.expires_at.isoformat()
    return made
