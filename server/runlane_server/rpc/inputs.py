"""Input requests on the wire: validation, conversion, and the record of an answer's origin."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

from runlane.v1 import input_pb2, run_pb2
from runlane.v1 import run_service_pb2 as pb
from runlane_server.access.caller import CALLER, CREDENTIALS
from runlane_server.agents.questions import MAX_ANSWER_BYTES
from runlane_server.core import model
from runlane_server.core.errors import AnswerInvalid
from runlane_server.core.input import Answer, InputKind, InputRequest, InputState
from runlane_server.rpc import convert
from runlane_server.rpc.checks import MAX_REASON_BYTES, Checks

KINDS: Mapping[InputKind, input_pb2.InputKind.ValueType] = MappingProxyType(
    {
        InputKind.APPROVAL: input_pb2.INPUT_KIND_APPROVAL,
        InputKind.CHOICE: input_pb2.INPUT_KIND_CHOICE,
        InputKind.FORM: input_pb2.INPUT_KIND_FORM,
        InputKind.TEXT: input_pb2.INPUT_KIND_TEXT,
    }
)

STATES: Mapping[InputState, input_pb2.InputState.ValueType] = MappingProxyType(
    {
        InputState.OPEN: input_pb2.INPUT_STATE_OPEN,
        InputState.ANSWERED: input_pb2.INPUT_STATE_ANSWERED,
        InputState.EXPIRED: input_pb2.INPUT_STATE_EXPIRED,
        InputState.WITHDRAWN: input_pb2.INPUT_STATE_WITHDRAWN,
    }
)

ESCAPED = 6
"""Most bytes that a byte of JSON takes if its sender escapes it. The limit of an answer applies to
what is stored, without escapes; this one keeps the server from parsing more than could fit."""

_STATES_FROM: Mapping[int, InputState] = {wire: state for state, wire in STATES.items()}

MAX_DIGEST_BYTES = 64


@dataclass(frozen=True, slots=True)
class InputFilter:
    """The input requests of a list. None and an empty set mean all."""

    session_id: str | None
    run_id: str | None
    states: frozenset[InputState]
    page_size: int


def list_inputs(
    request: pb.ListInputRequestsRequest,
    read: Callable[[InputFilter], tuple[int, ...] | None],
) -> tuple[InputFilter, tuple[int, ...] | None]:
    """Returns the filter and the decoded page token."""
    checks = Checks()
    checks.identifier("session_id", request.session_id)
    checks.identifier("run_id", request.run_id)
    checks.count("states", request.states)
    states = frozenset(
        checks.enum(f"states[{n}]", wire, _STATES_FROM.get, InputState.OPEN)
        for n, wire in enumerate(request.states)
    )
    wanted = InputFilter(
        session_id=request.session_id or None,
        run_id=request.run_id or None,
        states=states,
        page_size=checks.page_size(request.page_size),
    )
    return wanted, checks.finish_with(lambda: read(wanted))


def answer_input(request: pb.AnswerInputRequest, *, requires_digest: bool = False) -> Answer:
    """Returns the answer, with its origin; the engine checks it against the question.

    `requires_digest`: the answer to an approval must name the digest of the question.
    """
    checks = Checks()
    if not request.input_request_id:
        checks.reject("input_request_id", "is missing")
    checks.identifier("input_request_id", request.input_request_id)
    checks.identifier("answer_id", request.answer_id)
    checks.size("question_digest", request.question_digest, MAX_DIGEST_BYTES)
    kind = request.WhichOneof("answer")
    if kind is None:
        checks.reject("answer", "is missing", AnswerInvalid)
        checks.finish()
    if kind == "approval":
        checks.size("approval.reason", request.approval.reason, MAX_REASON_BYTES)
        if requires_digest and not request.question_digest:
            problem = "is missing, and this server requires it; send that of the question shown"
            checks.reject("question_digest", problem, AnswerInvalid)
    value = checks.finish_with(lambda: _value_of(request))
    return Answer(
        answer_id=request.answer_id,
        value_json=json.dumps(value, ensure_ascii=False),
        by=CALLER.get().name,
        how=_authentication(),
        peer=CREDENTIALS.get().peer,
        digest=request.question_digest,
        at=0,
    )


def _value_of(request: pb.AnswerInputRequest) -> Any:
    match request.WhichOneof("answer"):
        case "approval":
            approval = request.approval
            value: dict[str, Any] = {"approved": approval.approved}
            if approval.arguments_json:
                value["arguments"] = _object("approval.arguments_json", approval.arguments_json)
            if approval.reason:
                value["reason"] = approval.reason
            return value
        case "choice":
            return request.choice
        case "form_json":
            return _object("form_json", request.form_json)
        case _:
            return request.text


def _object(field: str, text: str) -> Any:
    if len(text) > ESCAPED * MAX_ANSWER_BYTES:
        raise AnswerInvalid.of(field, f"has more than {ESCAPED * MAX_ANSWER_BYTES} bytes")
    try:
        value = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise AnswerInvalid.of(field, "is not JSON") from None
    if not isinstance(value, dict):
        raise AnswerInvalid.of(field, "is not a JSON object")
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise AnswerInvalid.of(field, "is not valid Unicode: it has a lone surrogate") from None
    except ValueError:
        raise AnswerInvalid.of(field, "has a number that JSON has no form for") from None
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)


def kind_of(request: pb.AnswerInputRequest) -> InputKind:
    """The kind of question that the answer is for."""
    return {
        "approval": InputKind.APPROVAL,
        "choice": InputKind.CHOICE,
        "form_json": InputKind.FORM,
        "text": InputKind.TEXT,
    }[request.WhichOneof("answer") or "text"]


def _authentication() -> str:
    credentials = CREDENTIALS.get()
    if not CALLER.get().name:
        return "none"
    return "token" if "authorization" in credentials.metadata else "certificate"


# --- Conversion ---------------------------------------------------------------------------------


def input_request(record: InputRequest) -> input_pb2.InputRequest:
    """A stored request."""
    question = record.question
    return input_pb2.InputRequest(
        input_request_id=record.input_request_id,
        session_id=record.session_id,
        run_id=record.run_id,
        key=question.key,
        kind=KINDS[question.kind],
        text=question.text,
        tool_name=question.tool_name,
        arguments_json=question.arguments_json,
        choices=question.choices,
        schema_json=question.schema_json,
        state=STATES[record.state],
        requested_at=convert.timestamp(record.requested_at),
        expires_at=convert.optional_timestamp(record.expires_at),
        closed_at=convert.optional_timestamp(record.closed_at),
        question_digest=question.digest,
        answer=None if record.answer is None else _answer(question.kind, record.answer),
    )


def _answer(kind: InputKind, record: Answer) -> input_pb2.InputAnswer:
    value = json.loads(record.value_json)
    wire = input_pb2.InputAnswer(
        answer_id=record.answer_id,
        answered_by=record.by,
        authenticated_by=record.how,
        peer=record.peer,
        answered_at=convert.timestamp(record.at),
        question_digest=record.digest,
    )
    match kind:
        case InputKind.APPROVAL:
            arguments = value.get("arguments")
            shown = "" if arguments is None else json.dumps(arguments, ensure_ascii=False)
            wire.approval.approved = bool(value.get("approved"))
            wire.approval.arguments_json = shown
            wire.approval.reason = value.get("reason") or ""
        case InputKind.CHOICE:
            wire.choice = value
        case InputKind.FORM:
            wire.form_json = record.value_json
        case InputKind.TEXT:
            wire.text = value
    return wire


def fill_run_event(event: run_pb2.RunEvent, session_id: str, record: model.RunEvent) -> None:
    """Fills an empty event, of input or any other."""
    convert.fill_run_event(event, record)
    match record.body:
        case model.TextDelta():  # most of them
            pass
        case model.InputRequested() as asked:
            event.input_requested.input_request.CopyFrom(_requested(session_id, record, asked))
        case model.InputAnswered(name):
            event.input_answered.input_request_id = name
        case model.InputWithdrawn(name):
            event.input_withdrawn.input_request_id = name
        case model.InputExpired(name):
            event.input_expired.input_request_id = name
        case model.Resumed(attempt):
            event.resumed.attempt = attempt


def _requested(
    session_id: str, record: model.RunEvent, asked: model.InputRequested
) -> input_pb2.InputRequest:
    return input_pb2.InputRequest(
        input_request_id=asked.input_request_id,
        session_id=session_id,
        run_id=record.run_id,
        key=asked.key,
        kind=KINDS[InputKind(asked.kind)],
        text=asked.text,
        tool_name=asked.tool_name,
        arguments_json=asked.arguments_json,
        choices=json.loads(asked.choices_json),
        schema_json=asked.schema_json,
        state=input_pb2.INPUT_STATE_OPEN,
        requested_at=convert.timestamp(record.at),
        expires_at=convert.timestamp(asked.expires_at) if asked.expires_at else None,
        question_digest=asked.digest,
    )
