"""The questions that an agent in a worker asks people, and the answers."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from runlane.v1 import input_pb2
from runlane.worker.events import MAX_ID_BYTES, AgentError, clean, to_json
from runlane.worker.v1 import worker_service_pb2 as pb

MAX_QUESTION_BYTES = 256 << 10
"""Size limit of a question."""

INVALID = "QUESTION_INVALID"
"""Reason of a run that failed because its agent asked what nobody can answer."""


@dataclass(frozen=True, slots=True)
class Approval:
    """The answer to the request for an approval. `arguments` are those to use: the person may have
    changed them. `by` is the name of the caller who answered, if the server knows callers."""

    approved: bool
    arguments: Mapping[str, Any]
    reason: str = ""
    by: str = ""

    def __bool__(self) -> bool:
        return self.approved


class Questions:
    """The questions of one attempt."""

    def __init__(self) -> None:
        self._asked: Counter[str] = Counter()

    def question(
        self,
        text: str,
        *,
        key: str,
        tool_name: str,
        arguments: Mapping[str, Any] | None,
        choices: Sequence[str],
        schema: Mapping[str, Any] | None,
        timeout: float | None,
        default: Any,
    ) -> pb.Question:
        """A question with its key. Raises AgentError, with reason QUESTION_INVALID."""
        if isinstance(choices, str):
            raise AgentError("choices must be a list of strings", reason=INVALID)
        try:
            made = pb.Question(
                text=clean(text),
                tool_name=clean(tool_name),
                arguments_json="" if arguments is None else _json("arguments", arguments),
                choices=[clean(choice) for choice in choices],
                schema_json="" if schema is None else _json("schema", schema),
                default_json="" if default is None else _json("default", default),
            )
            if timeout is not None:
                made.timeout.FromTimedelta(timedelta(seconds=timeout))
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise AgentError(f"the question cannot be sent: {error}", reason=INVALID) from None
        made.key = clean(key) if key else self._key_of(made)
        _limit("key", len(made.key.encode()), MAX_ID_BYTES)
        _limit("the question", made.ByteSize(), 2 * MAX_QUESTION_BYTES)
        return made

    def _key_of(self, question: pb.Question) -> str:
        """The same key in each attempt that asks the same; equal questions are counted."""
        shown = [question.text, question.tool_name, question.arguments_json, question.schema_json]
        what = json.dumps([*shown, *question.choices])
        self._asked[what] += 1
        number = self._asked[what]
        return hashlib.blake2b(f"{number} {what}".encode(), digest_size=12).hexdigest()


def value_of(question: pb.Question, answer: input_pb2.InputAnswer) -> Any:
    """The value for the agent: an `Approval`, the choice, the object of the form, or the text."""
    match answer.WhichOneof("value"):
        case "approval":
            given = answer.approval
            arguments = given.arguments_json or question.arguments_json or "{}"
            return Approval(given.approved, json.loads(arguments), given.reason, answer.answered_by)
        case "form_json":
            return json.loads(answer.form_json)
        case "choice":
            return answer.choice
        case _:
            return answer.text


def _json(field: str, value: object) -> str:
    try:
        return to_json(field, value)
    except AgentError as error:
        raise AgentError(error.message, reason=INVALID) from None


def _limit(field: str, size: int, limit: int) -> None:
    if size > limit:
        raise AgentError(f"{field} has {size} bytes; {limit} is the limit", reason=INVALID)
