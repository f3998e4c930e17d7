"""Input requests: the questions of agents to people, and the answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TypeAlias

from google.protobuf.timestamp_pb2 import Timestamp

from runlane.v1 import input_pb2, run_pb2
from runlane.v1 import run_service_pb2 as pb


class InputKind(StrEnum):
    """The question of an input request."""

    APPROVAL = "approval"
    """The approval of a tool call: answer with an `Approval` or a bool."""
    CHOICE = "choice"
    """One of `choices`: answer with a str."""
    FORM = "form"
    """An object that matches the JSON Schema `schema_json`: answer with a mapping."""
    TEXT = "text"
    """A text: answer with a str."""
    UNKNOWN = "unknown"
    """A kind of a newer server, unknown to this client."""


class InputState(StrEnum):
    """The state of an input request."""

    OPEN = "open"
    """It waits for an answer."""
    ANSWERED = "answered"
    """It was answered."""
    EXPIRED = "expired"
    """Nobody answered in time."""
    WITHDRAWN = "withdrawn"
    """Its run was cancelled or has ended."""
    UNKNOWN = "unknown"
    """A state of a newer server, unknown to this client."""


@dataclass(frozen=True, slots=True)
class Approval:
    """The answer to the request for an approval.

    `arguments_json` replaces the arguments of the tool call, if it is not empty.
    """

    approved: bool
    arguments_json: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class InputAnswer:
    """An answer, and the record of its origin.

    `value` is an `Approval`, the choice, the form as JSON, or the text. `answered_by` is the name
    of the caller, empty on a server without access control; `authenticated_by` is `token`,
    `certificate` or `none`, `default` for a default answer, or `grant` for a standing approval;
    `peer` is the address of the caller.
    """

    answer_id: str
    value: Approval | str
    answered_by: str
    authenticated_by: str
    peer: str
    answered_at: datetime
    question_digest: str


@dataclass(frozen=True, slots=True)
class InputRequest:
    """A question of an agent to people.

    `tool_name` and `arguments_json` are those of an approval. `question_digest` identifies what is
    shown to the person; an answer that carries it cannot be taken for an answer to another one.
    """

    input_request_id: str
    session_id: str
    run_id: str
    key: str
    kind: InputKind
    text: str
    tool_name: str
    arguments_json: str
    choices: tuple[str, ...]
    schema_json: str
    state: InputState
    requested_at: datetime
    expires_at: datetime | None
    closed_at: datetime | None
    question_digest: str
    answer: InputAnswer | None


@dataclass(frozen=True, slots=True)
class AnswerReceipt:
    """The reply to an answer: the request with the answer that counts, and whether that is this
    one or an earlier one with the same `answer_id`."""

    input_request: InputRequest
    accepted: bool


# --- Events --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InputRequested:
    """The agent asked people. An attempt that asks again repeats the event, with the same id."""

    input_request: InputRequest


@dataclass(frozen=True, slots=True)
class InputAnswered:
    """An input request was answered. If no other is open, the run waits for a slot."""

    input_request_id: str


@dataclass(frozen=True, slots=True)
class InputWithdrawn:
    """An input request takes no answer any more: the run was cancelled or has ended."""

    input_request_id: str


@dataclass(frozen=True, slots=True)
class InputExpired:
    """Nobody answered an input request in time: its default applies, or the run fails."""

    input_request_id: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """The attempt continues after input; its output so far stays."""

    attempt: int


Answer: TypeAlias = Approval | bool | str | Mapping[str, Any]
"""An answer: an approval, a choice, a text, or a form."""

_KINDS = {
    input_pb2.INPUT_KIND_APPROVAL: InputKind.APPROVAL,
    input_pb2.INPUT_KIND_CHOICE: InputKind.CHOICE,
    input_pb2.INPUT_KIND_FORM: InputKind.FORM,
    input_pb2.INPUT_KIND_TEXT: InputKind.TEXT,
}

_STATES = {
    input_pb2.INPUT_STATE_OPEN: InputState.OPEN,
    input_pb2.INPUT_STATE_ANSWERED: InputState.ANSWERED,
    input_pb2.INPUT_STATE_EXPIRED: InputState.EXPIRED,
    input_pb2.INPUT_STATE_WITHDRAWN: InputState.WITHDRAWN,
}

_STATE_NUMBERS = {state: number for number, state in _STATES.items()}


def to_state(state: str) -> input_pb2.InputState.ValueType:
    """The number of a state. Raises ValueError."""
    if state not in set(_STATE_NUMBERS):
        raise ValueError(f"states: {state!r} is not one of {', '.join(_STATE_NUMBERS)}")
    return _STATE_NUMBERS[InputState(state)]


def to_request(
    input_request: InputRequest, answer: Answer, answer_id: str
) -> pb.AnswerInputRequest:
    """The call that answers a question. Raises TypeError for an answer of the wrong type."""
    call = pb.AnswerInputRequest(
        input_request_id=input_request.input_request_id,
        answer_id=answer_id,
        question_digest=input_request.question_digest,
    )
    match input_request.kind, answer:
        case InputKind.APPROVAL, bool():
            call.approval.approved = answer
        case InputKind.APPROVAL, Approval(approved, arguments_json, reason):
            call.approval.approved = approved
            call.approval.arguments_json = arguments_json
            call.approval.reason = reason
        case InputKind.CHOICE, str():
            call.choice = answer
        case InputKind.FORM, Mapping():
            call.form_json = json.dumps(dict(answer), ensure_ascii=False)
        case InputKind.TEXT, str():
            call.text = answer
        case kind, _:
            name = type(answer).__name__
            raise TypeError(f"answer: a {name} does not answer a question of kind {kind.value}")
    return call


def input_request(message: input_pb2.InputRequest) -> InputRequest:
    """Converts an input request."""
    return InputRequest(
        input_request_id=message.input_request_id,
        session_id=message.session_id,
        run_id=message.run_id,
        key=message.key,
        kind=_KINDS.get(message.kind, InputKind.UNKNOWN),
        text=message.text,
        tool_name=message.tool_name,
        arguments_json=message.arguments_json,
        choices=tuple(message.choices),
        schema_json=message.schema_json,
        state=_STATES.get(message.state, InputState.UNKNOWN),
        requested_at=_time(message.requested_at),
        expires_at=_time(message.expires_at) if message.HasField("expires_at") else None,
        closed_at=_time(message.closed_at) if message.HasField("closed_at") else None,
        question_digest=message.question_digest,
        answer=_answer(message.answer) if message.HasField("answer") else None,
    )


def event_body(
    message: run_pb2.RunEvent,
) -> InputRequested | InputAnswered | InputWithdrawn | InputExpired | Resumed | None:
    """Converts the body of an event of input; None for any other."""
    match message.WhichOneof("event"):
        case "input_requested":
            return InputRequested(input_request(message.input_requested.input_request))
        case "input_answered":
            return InputAnswered(message.input_answered.input_request_id)
        case "input_withdrawn":
            return InputWithdrawn(message.input_withdrawn.input_request_id)
        case "input_expired":
            return InputExpired(message.input_expired.input_request_id)
        case "resumed":
            return Resumed(message.resumed.attempt)
        case _:
            return None


def _answer(message: input_pb2.InputAnswer) -> InputAnswer:
    kind = message.WhichOneof("value")
    value: Approval | str = "" if kind is None or kind == "approval" else getattr(message, kind)
    if kind == "approval":
        given = message.approval
        value = Approval(given.approved, given.arguments_json, given.reason)
    return InputAnswer(
        answer_id=message.answer_id,
        value=value,
        answered_by=message.answered_by,
        authenticated_by=message.authenticated_by,
        peer=message.peer,
        answered_at=_time(message.answered_at),
        question_digest=message.question_digest,
    )


def _time(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(UTC)
