"""The questions that agents ask, and the check of the answers.

Both come from code or people of any kind, so everything has a limit. A form is described by JSON
Schema; a schema that refers to another document is refused, and none is ever fetched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from runlane_server.agents.base import AgentError, Approval
from runlane_server.agents.form_checks import FORMS, CheckFailed
from runlane_server.core.errors import AnswerInvalid, RunlaneError, Violation
from runlane_server.core.input import Answer, InputKind, Question
from runlane_server.core.model import clean_text, utf8_size

MAX_CHECKPOINT_BYTES = 3 << 20
"""Size limit of what an agent keeps while it waits for input."""

MAX_QUESTION_BYTES = 256 << 10
"""Size limit of a question: its text, its arguments, its schema and its default together."""

MAX_ANSWER_BYTES = 64 << 10
"""Size limit of an answer, as JSON."""

MAX_DEFAULT_BYTES = 4 << 10
"""Size limit of a default answer, as JSON: it is kept with the lane."""

MAX_CHOICES = 100
MAX_CHOICE_BYTES = 1 << 10
MAX_KEY_BYTES = 128
MAX_NAME_BYTES = 1 << 10
MAX_TIMEOUT_DAYS = 3650

INVALID = "QUESTION_INVALID"
"""Reason of a run that failed because its agent asked what nobody can answer."""

Json: TypeAlias = Any


class Asked(NamedTuple):
    """The arguments of `Turn.ask`."""

    text: str
    key: str = ""
    tool_name: str = ""
    arguments: Mapping[str, Json] | None = None
    choices: Sequence[str] = ()
    schema: Mapping[str, Json] | None = None
    timeout: float | None = None
    default: Json = None


def check_checkpoint(questions: Sequence[Asked], checkpoint: str) -> None:
    """Raises AgentError if an agent cannot leave with them."""
    if not (questions and checkpoint):
        raise AgentError("ask_and_leave: give a question and a checkpoint")
    try:
        size = utf8_size(checkpoint)
    except UnicodeEncodeError:
        raise AgentError(
            "ask_and_leave: the checkpoint has a lone surrogate, which is no text"
        ) from None
    if size > MAX_CHECKPOINT_BYTES:
        raise AgentError(
            f"ask_and_leave: the checkpoint has {size} bytes; {MAX_CHECKPOINT_BYTES} is the limit"
        )


def question_of(asked: Asked, *, repeated: int = 0) -> Question:
    """The question of an agent. Raises AgentError, with reason QUESTION_INVALID.

    `check_question` checks its schema and its default.

    Without a key it gets one that is the same in each attempt that asks the same; `repeated` counts
    the equal questions before it.
    """
    forms = [bool(asked.tool_name), bool(asked.choices), asked.schema is not None]
    if sum(forms) > 1:
        raise _invalid("tool_name, choices and schema exclude each other")
    question = Question(
        key="",
        kind=_kind(asked),
        text=_text("text", asked.text),
        tool_name=_text("tool_name", asked.tool_name),
        arguments_json=_json("arguments", asked.arguments or {}) if asked.tool_name else "",
        choices=_choices(asked.choices),
        schema_json=_schema(asked.schema),
        timeout=_timeout(asked.timeout),
    )
    _limit("tool_name", question.tool_name, MAX_NAME_BYTES)
    question = question._replace(key=_key(asked, question, repeated))
    size = sum(utf8_size(part) for part in question if isinstance(part, str))
    if size > MAX_QUESTION_BYTES:
        raise _invalid(f"the question has {size} bytes; {MAX_QUESTION_BYTES} is the limit")
    return question._replace(default_json=_default(asked, question))


def _kind(asked: Asked) -> InputKind:
    if asked.tool_name:
        return InputKind.APPROVAL
    if asked.choices:
        return InputKind.CHOICE
    return InputKind.TEXT if asked.schema is None else InputKind.FORM


def _key(asked: Asked, question: Question, repeated: int) -> str:
    if asked.key:
        _limit("key", asked.key, MAX_KEY_BYTES)
        return _text("key", asked.key)
    digest = hashlib.blake2b(f"{question.digest} {repeated}".encode(), digest_size=8)
    return f"{question.kind}-{digest.hexdigest()}"


def _choices(choices: object) -> tuple[str, ...]:
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        raise _invalid("choices must be a list of strings")
    if len(choices) > MAX_CHOICES:
        raise _invalid(f"there are {len(choices)} choices; {MAX_CHOICES} is the limit")
    texts = tuple(_text("choices", choice) for choice in choices)
    for text in texts:
        _limit("choices", text, MAX_CHOICE_BYTES)
    if len(set(texts)) != len(texts) or "" in texts:
        raise _invalid("each choice must be there once, and must not be empty")
    return texts


def _schema(schema: Mapping[str, Json] | None) -> str:
    if schema is None:
        return ""
    text = _json("schema", schema)
    if utf8_size(text) > MAX_QUESTION_BYTES:
        raise _invalid(f"schema has {utf8_size(text)} bytes; {MAX_QUESTION_BYTES} is the limit")
    return text


def _timeout(seconds: object) -> int | None:
    if seconds is None:
        return None
    if not isinstance(seconds, int | float) or not 0 < seconds <= MAX_TIMEOUT_DAYS * 86400:
        raise _invalid(f"timeout must be above 0 and at most {MAX_TIMEOUT_DAYS} days, in seconds")
    return round(seconds * 1e6)


def _default(asked: Asked, question: Question) -> str | None:
    if asked.default is None:
        return None
    if question.timeout is None:
        raise _invalid("default applies when the time is over; give a timeout as well")
    value = asked.default
    if question.kind is InputKind.APPROVAL:
        value = {"approved": value}
    text = _json("default", value)
    _limit("default", text, MAX_DEFAULT_BYTES)
    return text


async def check_question(question: Question, tenant: str) -> None:
    """Checks what takes time: the schema, and the default answer. Raises AgentError."""
    try:
        if question.schema_json:
            problem = await FORMS.schema_problem(tenant, question.schema_json)
            if problem:
                raise _invalid(problem)
        if question.default_json is not None:
            await check_answer(question, question.default_json, tenant)
    except CheckFailed as error:
        raise _invalid(f"schema {error}") from error
    except AnswerInvalid as error:
        raise _invalid(f"default is no answer: {error.message}") from error


def check_same(earlier: Question, question: Question) -> None:
    """Raises AgentError if a question is not the earlier one with its key, whose answer it would
    get (R44).

    What is approved is all that was shown. Other questions may have another text, such as one with
    the time in it.
    """
    if _subject(earlier) != _subject(question):
        raise _invalid(f"key: {question.key!r} names another question; give this one its own key")


def _subject(question: Question) -> tuple[str, ...]:
    """The parts in which a question and its repetition agree."""
    shown = question.text if question.kind is InputKind.APPROVAL else ""
    forms = map(_sorted, (question.arguments_json, question.schema_json))
    return (question.kind, shown, question.tool_name, *forms, *question.choices)


def _sorted(text: str) -> str:
    """JSON whose keys are in order: a model may repeat its arguments in another order."""
    return json.dumps(json.loads(text), sort_keys=True) if text else ""


# --- Answers ------------------------------------------------------------------------------------


async def check_answer(question: Question, value_json: str, tenant: str) -> None:
    """Raises AnswerInvalid if the value does not answer the question."""
    if utf8_size(value_json) > MAX_ANSWER_BYTES:
        size = utf8_size(value_json)
        raise AnswerInvalid.of("answer", f"has {size} bytes; {MAX_ANSWER_BYTES} is the limit")
    try:
        value = json.loads(value_json, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise AnswerInvalid.of("answer", "is not JSON") from None
    match question.kind:
        case InputKind.CHOICE if value not in question.choices:
            raise AnswerInvalid.of(
                "answer.choice", f"must be one of {', '.join(question.choices)}"[:1000]
            )
        case InputKind.TEXT if not isinstance(value, str):
            raise AnswerInvalid.of("answer.text", "must be a text")
        case InputKind.APPROVAL if not _is_approval(value):
            raise AnswerInvalid.of("answer.approval", "must be an approval")
        case InputKind.FORM:
            await _check_form(question, value_json, tenant)
        case _:
            pass


def _is_approval(value: Json) -> bool:
    arguments = value.get("arguments", {}) if isinstance(value, dict) else None
    return isinstance(arguments, dict) and isinstance(value.get("approved"), bool)


async def _check_form(question: Question, value_json: str, tenant: str) -> None:
    try:
        found = await FORMS.violations(tenant, question.schema_json, value_json)
    except RunlaneError:
        raise
    except CheckFailed as error:
        raise AnswerInvalid.of("answer.form", f"the schema {error}") from error
    except Exception as error:  # a schema of an agent may break its own validation
        problem = f"cannot be checked by the schema: {type(error).__name__}"
        raise AnswerInvalid.of("answer.form", problem) from error
    if found:
        wrong = [Violation(f"answer.form{path}", text) for path, text in found]
        message = "; ".join(f"{one.field}: {one.description}" for one in wrong)
        raise AnswerInvalid(message, violations=wrong)


def value_of(question: Question, answer: Answer) -> Json:
    """The agent's value: an `Approval`, the choice, the object of the form, or the text."""
    value = json.loads(answer.value_json)
    if question.kind is not InputKind.APPROVAL:
        return value
    arguments = value.get("arguments")
    return Approval(
        approved=bool(value.get("approved")),
        arguments=json.loads(question.arguments_json) if arguments is None else arguments,
        reason=str(value.get("reason") or ""),
        by=answer.by,
    )


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _json(field: str, value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _invalid(f"{field} cannot be written as JSON: {error}") from error
    return clean_text(text)


def _text(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise _invalid(f"{field} must be a str, not {type(value).__name__}")
    return clean_text(value)


def _limit(field: str, text: str, limit: int) -> None:
    if utf8_size(text) > limit:
        raise _invalid(f"{field} has {utf8_size(text)} bytes; {limit} is the limit")


def _invalid(problem: str) -> AgentError:
    return AgentError(problem, reason=INVALID)
