"""The questions of agents to people, as messages; and messages as their answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from a2a.types import a2a_pb2 as pb
from a2a.utils.errors import A2AError, InvalidParamsError

from runlane.inputs import Answer, Approval, InputKind, InputRequest
from runlane_a2a.errors import refuse
from runlane_a2a.parts import data_of, data_part, json_part, text_part

REQUEST_ID, DIGEST = "inputRequestId", "questionDigest"
"""Members of the data part of a question, to be sent back with the answer."""


def question_message(*requests: InputRequest) -> pb.Message:
    """The message that asks: each question as text, and as data what an answer needs."""
    first, *more = requests
    name = first.input_request_id
    if more:
        name = str(uuid5(NAMESPACE_URL, ":".join(each.input_request_id for each in requests)))
    return pb.Message(
        message_id=name,
        context_id=first.session_id,
        task_id=first.run_id,
        role=pb.ROLE_AGENT,
        parts=[part for each in requests for part in _question(each)],
    )


def _question(request: InputRequest) -> tuple[pb.Part, pb.Part]:
    data: dict[str, Any] = {
        REQUEST_ID: request.input_request_id,
        DIGEST: request.question_digest,
        "kind": request.kind.value,
    }
    if request.choices:
        data["choices"] = list(request.choices)
    if request.schema_json:
        data["schemaJson"] = request.schema_json
    if request.kind is InputKind.APPROVAL:
        # As text: a person approves these characters, and no number may lose a digit.
        data |= {"toolName": request.tool_name, "argumentsJson": request.arguments_json}
    return text_part(request.text), data_part(data)


def answer_message(request: InputRequest) -> pb.Message | None:
    """The answer of a person, as a message; None if there is none."""
    if request.answer is None:
        return None
    value = request.answer.value
    if isinstance(value, Approval):
        part = data_part(
            {"approved": value.approved, "reason": value.reason}
            if value.reason
            else {"approved": value.approved}
        )
    elif request.kind is InputKind.FORM:
        part = json_part(value)
    else:
        part = text_part(value)
    return pb.Message(
        message_id=request.answer.answer_id,
        context_id=request.session_id,
        task_id=request.run_id,
        role=pb.ROLE_USER,
        parts=[part],
    )


def find_request(message: pb.Message, requests: Iterable[InputRequest]) -> InputRequest:
    """Returns the open question that a message answers. Raises A2AError.

    Args:
        message: The message.
        requests: The open questions of the task, at least one.
    """
    found = sorted(requests, key=lambda each: each.requested_at)
    data = data_of(message.parts) or {}
    named = data.get(REQUEST_ID)
    if named is None:
        if len(found) > 1:
            raise _invalid(f"{len(found)} questions are open; name one by {REQUEST_ID}")
        return found[0]
    for each in found:
        if each.input_request_id == named:
            _check_digest(each, data)
            return each
    raise _invalid(f"{REQUEST_ID} names no open question of this task")


def as_seen(message: pb.Message, request: InputRequest) -> InputRequest:
    """The question as its answer names it: an approval has no digest unless the caller sent it,
    because only the caller knows what a person saw."""
    if request.kind is not InputKind.APPROVAL or DIGEST in (data_of(message.parts) or {}):
        return request
    return replace(request, question_digest="")


def read_answer(message: pb.Message, request: InputRequest) -> Answer:
    """Reads the answer to a question. Raises A2AError."""
    data = data_of(message.parts)
    if request.kind is InputKind.APPROVAL:
        return _approval(data)
    if request.kind is InputKind.FORM:
        return _form(data)
    text = "\n\n".join(part.text for part in message.parts if part.WhichOneof("content") == "text")
    if not text:
        raise _invalid("the answer must be a text part")
    return text


def answer_id(message: pb.Message, request: InputRequest) -> str:
    """The idempotency key of an answer: callers may use an id of a message again elsewhere."""
    name = f"a2a:{request.input_request_id}:{message.message_id}"
    return str(uuid5(NAMESPACE_URL, name))


def is_repeated(message: pb.Message, request: InputRequest) -> bool:
    """Returns True if a question was answered by this very message before.

    Its id is not enough: some callers use one for several messages.
    """
    if request.answer is None or request.answer.answer_id != answer_id(message, request):
        return False
    value = request.answer.value
    try:
        answer = read_answer(message, request)
    except A2AError:
        return False
    if isinstance(answer, Mapping):
        return isinstance(value, str) and json.loads(value) == answer
    return answer == value


def _approval(data: Mapping[str, Any] | None) -> Approval:
    """An approval names its question: a late "yes" must not approve the next one."""
    if data is None or data.get(REQUEST_ID) is None or not isinstance(data.get("approved"), bool):
        raise _invalid(f"an approval must be a data part with {REQUEST_ID} and approved (a bool)")
    reason = data.get("reason", "")
    if not isinstance(reason, str):
        raise _invalid("reason must be a string")
    return Approval(data["approved"], reason=reason)


def _form(data: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if data is None:
        raise _invalid("a form must be a data part with an object")
    if REQUEST_ID not in data:
        return data
    answer = data.get("answer")
    if not isinstance(answer, dict):
        raise _invalid(f"a form that names its question by {REQUEST_ID} must be in answer")
    return answer


def _check_digest(request: InputRequest, data: Mapping[str, Any]) -> None:
    if data.get(DIGEST, request.question_digest) != request.question_digest:
        raise _invalid(f"{DIGEST} is not that of the question")


def _invalid(problem: str) -> A2AError:
    return refuse(InvalidParamsError, problem, field="message.parts", reason="ANSWER_INVALID")
