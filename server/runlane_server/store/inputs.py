"""Input requests in a database: their encoding, and the records from their rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from runlane_server.core.errors import CorruptRecord
from runlane_server.core.input import (
    NO_INPUT,
    Answer,
    InputChange,
    InputKind,
    InputRequest,
    InputState,
    LateInput,
    OpenInput,
    Question,
    RunInput,
)
from runlane_server.core.model import utf8_size
from runlane_server.store.base import DueInput, Page
from runlane_server.store.corrupt import EXPLANATION, decoded, text_or_empty
from runlane_server.store.paging import numbered_page
from runlane_server.store.records import DecodeText, Row, readable_keys

_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

INPUT_BYTES = 500
"""The assumed size of an input request besides its question and its answer."""


def encode_asking(asking: RunInput) -> str | None:
    """Encodes what a lane knows of a run's input requests; None if there is nothing. The open
    requests come first: an index of PostgreSQL depends on it."""
    return None if asking is NO_INPUT or asking == NO_INPUT else _dumps(asking)


def decode_asking(text: str | None) -> RunInput:
    """Decodes the result of `encode_asking`."""
    if text is None:
        return NO_INPUT
    pending, asked, late, *rest = json.loads(text)
    return RunInput(
        tuple(OpenInput(*one) for one in pending),
        asked,
        tuple(LateInput(InputState(state), *names) for state, *names in late),
        *rest,
    )


def encode_question(question: Question) -> str:
    """Encodes a question."""
    return _dumps(question)


def decode_question(text: str) -> Question:
    """Decodes the result of `encode_question`."""
    key, kind, shown, tool_name, arguments, choices, *rest = json.loads(text)
    return Question(key, InputKind(kind), shown, tool_name, arguments, tuple(choices), *rest)


def encode_answer(answer: Answer | None) -> str | None:
    """Encodes an answer."""
    return None if answer is None else _dumps(answer)


def decode_answer(text: str | None) -> Answer | None:
    """Decodes the result of `encode_answer`."""
    return None if text is None else Answer(*json.loads(text))


def input_weight(changes: Iterable[InputChange]) -> int:
    """The bytes of new requests and of answers."""
    size = 0
    for change in changes:
        if change.request is not None:
            size += INPUT_BYTES + utf8_size(encode_question(change.request.question))
        size += utf8_size(encode_answer(change.answer) or "")
    return size


def input_from(tenant: str, row: Row, text: DecodeText) -> InputRequest:
    """An input request; one that cannot be read says so and takes no answer."""
    return decoded(
        lambda: InputRequest(
            text(row["input_request_id"]),
            text(row["session_id"]),
            text(row["run_id"]),
            decode_question(row["question"]),
            InputState(row["state"]),
            row["requested_at"],
            row["expires_at"],
            row["closed_at"],
            decode_answer(row["answer"]),
        ),
        lambda: _corrupt(row),
        "input request",
        tenant,
        row["input_request_id"],
    )


def _corrupt(row: Row) -> InputRequest:
    return InputRequest(
        text_or_empty(row["input_request_id"]),
        text_or_empty(row["session_id"]),
        text_or_empty(row["run_id"]),
        Question("", InputKind.TEXT, f"[{CorruptRecord.reason}] {EXPLANATION}"),
        InputState.WITHDRAWN,
        0,
        None,
    )


def inputs_page(
    tenant: str, rows: Sequence[Row], text: DecodeText, limit: int
) -> Page[InputRequest, int]:
    """A page of input requests, from rows of which there is one more if the list goes on."""
    return numbered_page(
        rows,
        limit,
        item=lambda row: input_from(tenant, row, text),
        number=lambda row: int(row["request_no"]),
    )


def due_inputs(rows: Iterable[Row], text: DecodeText) -> list[DueInput]:
    """Open requests whose time is over, without those that cannot be read."""
    return [
        DueInput(key, text(row["run_id"]), text(row["input_request_id"]))
        for row, key in readable_keys(rows, text)
    ]
