"""A message of a caller as a new run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from a2a.types import a2a_pb2 as pb
from a2a.utils.errors import InvalidParamsError, UnsupportedOperationError
from google.protobuf import json_format

from runlane.ids import new_id
from runlane_a2a.errors import refuse
from runlane_a2a.parts import Content, plain, read_parts
from runlane_a2a.settings import Settings

HOPS = "runlane.hops"
"""Key of the metadata with the number of agents that the message has passed."""

MESSAGE_ID_LABEL, HOPS_LABEL, REFERENCES_LABEL = "a2a.message_id", "a2a.hops", "a2a.references"
"""Labels of the run: the id of the message, the number of agents it has passed including this one,
and the tasks that it refers to, by commas."""

_MAX_MESSAGE_ID = 1024
_MAX_LABEL = 4096


@dataclass(frozen=True, slots=True)
class NewTask:
    """A task to be started."""

    context_id: str
    run_id: str
    content: Content
    labels: dict[str, str]


def read_new_task(request: pb.SendMessageRequest, settings: Settings, run_id: str) -> NewTask:
    """Reads the message that starts a task. Raises A2AError.

    Args:
        request: The request.
        settings: The settings.
        run_id: The idempotency key of the call; empty: none. The same call must then name the same
            session, also if it leaves the choice to the server.
    """
    message = request.message
    context_id = message.context_id or (str(uuid5(NAMESPACE_URL, run_id)) if run_id else new_id())
    content = read_parts(message.parts, settings.modes)
    if not content.text and not any(isinstance(one.content, str) for one in content.attachments):
        raise refuse(
            InvalidParamsError,
            "must have text or data for the agent",
            field="message.parts",
            reason="EMPTY_PROMPT",
        )
    return NewTask(context_id, run_id, content, _labels(request, settings))


def check_message(request: pb.SendMessageRequest) -> None:
    """Checks what every message must be. Raises A2AError."""
    message = request.message
    if message.role != pb.ROLE_USER:
        raise refuse(InvalidParamsError, "must be ROLE_USER", field="message.role")
    if len(message.message_id.encode()) > _MAX_MESSAGE_ID:
        raise refuse(
            InvalidParamsError, f"exceeds {_MAX_MESSAGE_ID} bytes", field="message.messageId"
        )


def _labels(request: pb.SendMessageRequest, settings: Settings) -> dict[str, str]:
    message = request.message
    given = {**_metadata(request), **_metadata(message)}
    labels = {key: _label(key, given[key]) for key in settings.metadata & given.keys()}
    references = ",".join(message.reference_task_ids)
    if len(references.encode()) > _MAX_LABEL:
        raise refuse(
            InvalidParamsError, f"exceed {_MAX_LABEL} bytes", field="message.referenceTaskIds"
        )
    if references:
        labels[REFERENCES_LABEL] = references
    labels[MESSAGE_ID_LABEL] = message.message_id
    labels[HOPS_LABEL] = str(_hops(request, settings) + 1)
    return labels


def _metadata(message: pb.SendMessageRequest | pb.Message) -> dict[str, Any]:
    try:
        made: dict[str, Any] = plain(message.metadata)
    except (ValueError, json_format.SerializeToJsonError):
        raise refuse(
            InvalidParamsError, "has a number that JSON cannot hold", field="message.metadata"
        ) from None
    return made


def _label(key: str, value: Any) -> str:
    text = (
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    )
    if len(text.encode()) > _MAX_LABEL:
        raise refuse(
            InvalidParamsError, f"exceeds {_MAX_LABEL} bytes", field=f"message.metadata.{key}"
        )
    return text


def _hops(request: pb.SendMessageRequest, settings: Settings) -> int:
    """The number of agents that the message has passed: agents that call each other could go on
    for ever."""
    hops = 0
    for found in (_metadata(request), _metadata(request.message)):
        value = found.get(HOPS, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise refuse(
                InvalidParamsError, "must be a number of 0 or more", field=f"metadata.{HOPS}"
            )
        hops = max(hops, int(value))
    if hops >= settings.max_hops:
        raise refuse(
            UnsupportedOperationError,
            f"the message has passed {hops} agents, and at most {settings.max_hops} are allowed",
            field=f"metadata.{HOPS}",
            reason="TOO_MANY_HOPS",
        )
    return hops
