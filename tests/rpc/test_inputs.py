r"""Answers on the wire: JSON that no store or parser takes is refused, and names its field."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from runlane.v1 import input_pb2
from runlane.v1 import run_service_pb2 as pb
from runlane_server.access.caller import ANONYMOUS, CALLER, CREDENTIALS, Credentials
from runlane_server.agents.questions import MAX_ANSWER_BYTES
from runlane_server.core.errors import AnswerInvalid
from runlane_server.rpc.inputs import answer_input

REFUSED = {
    r'{"a":"\ud800"}': "lone surrogate",
    r'{"\udfff":1}': "lone surrogate",
    r'{"a":[{"b":"x\udc00\ud800"}]}': "lone surrogate",
    '{"a":NaN}': "is not JSON",
    '{"a":-Infinity}': "is not JSON",
    '{"a":1e999}': "number",
    "{": "is not JSON",
    "[]": "is not a JSON object",
}


@pytest.fixture(autouse=True)
def caller() -> Iterator[None]:
    caller, credentials = CALLER.set(ANONYMOUS), CREDENTIALS.set(Credentials())
    yield
    CALLER.reset(caller)
    CREDENTIALS.reset(credentials)


def form(text: str) -> pb.AnswerInputRequest:
    return pb.AnswerInputRequest(input_request_id="i", form_json=text)


def approval(text: str) -> pb.AnswerInputRequest:
    given = input_pb2.Approval(approved=True, arguments_json=text)
    return pb.AnswerInputRequest(input_request_id="i", approval=given)


@pytest.mark.parametrize("text", REFUSED)
def test_json_that_cannot_be_stored_is_refused(text: str) -> None:
    with pytest.raises(AnswerInvalid, match=f"form_json: .*{REFUSED[text]}"):
        answer_input(form(text))
    with pytest.raises(AnswerInvalid, match=rf"approval\.arguments_json: .*{REFUSED[text]}"):
        answer_input(approval(text))


def test_a_pair_of_surrogates_is_a_character() -> None:
    assert answer_input(form(r'{"a":"\ud83d\ude00"}')).value_json == '{"a": "\U0001f600"}'


def test_escapes_of_a_sender_do_not_count_against_the_limit() -> None:
    value = {"a": "漢" * (MAX_ANSWER_BYTES // 3 - 10)}
    kept = answer_input(form(json.dumps(value))).value_json
    assert json.loads(kept) == value
    assert len(kept.encode()) < MAX_ANSWER_BYTES < len(json.dumps(value))
    with pytest.raises(AnswerInvalid, match="form_json: has more than"):
        answer_input(form("{" + " " * 6 * MAX_ANSWER_BYTES))
