"""Push notifications of A2A 1.0: the status of a task, as its JSON.

It is what the A2A facade (`runlane_a2a`) sends as the status of the same task to its streams. The
facade is a client, and not imported here; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from runlane_server.core.input import InputKind, InputRequest
from runlane_server.core.model import Micros, RunComplete, RunState
from runlane_server.rpc import convert

REJECTED = "REJECTED"
"""The reason of an agent's error that makes its task rejected, not failed."""

_ENDS: Mapping[RunState, str] = MappingProxyType(
    {
        RunState.COMPLETED: "TASK_STATE_COMPLETED",
        RunState.CANCELLED: "TASK_STATE_CANCELED",
        RunState.FAILED: "TASK_STATE_FAILED",
    }
)


def status_update(body: RunComplete | InputRequest) -> Mapping[str, Any]:
    """A TaskStatusUpdateEvent: the end of a task, or its question."""
    status = _end(body) if isinstance(body, RunComplete) else _question(body)
    return {"taskId": body.run_id, "contextId": body.session_id, "status": status}


def _end(complete: RunComplete) -> Mapping[str, Any]:
    error = complete.error
    if error is None:
        return _status(_ENDS[complete.state], complete.ended_at)
    state = "TASK_STATE_REJECTED" if error.reason == REJECTED else _ENDS[complete.state]
    message = _message(complete, f"end:{complete.run_id}", {"text": error.message})
    return _status(state, complete.ended_at, {**message, "metadata": {"reason": str(error.reason)}})


def _question(request: InputRequest) -> Mapping[str, Any]:
    question = request.question
    data: dict[str, Any] = {
        "inputRequestId": request.input_request_id,
        "questionDigest": question.digest,
        "kind": str(question.kind),
    }
    if question.choices:
        data["choices"] = list(question.choices)
    if question.schema_json:
        data["schemaJson"] = question.schema_json
    if question.kind is InputKind.APPROVAL:
        data |= {"toolName": question.tool_name, "argumentsJson": question.arguments_json}
    parts = {"text": question.text}, {"data": data, "mediaType": "application/json"}
    message = _message(request, request.input_request_id, *parts)
    return _status("TASK_STATE_INPUT_REQUIRED", request.requested_at, message)


def _message(
    body: RunComplete | InputRequest, message_id: str, *parts: Mapping[str, Any]
) -> Mapping[str, Any]:
    return {
        "messageId": message_id,
        "contextId": body.session_id,
        "taskId": body.run_id,
        "role": "ROLE_AGENT",
        "parts": list(parts),
    }


def _status(state: str, at: Micros, message: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    status = {"state": state, "timestamp": convert.timestamp(at).ToJsonString()}
    return status if message is None else {**status, "message": message}
