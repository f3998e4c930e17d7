"""Records as JSON for an assistant: bounded, and with every control character made visible.

Prompts, answers, titles and ids come from other people. An assistant shows them to a person, and
reads them itself: nothing in them may be hidden from either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runlane.cli.output import to_json
from runlane.cli.terminal import escaped
from runlane.errors import RunlaneError
from runlane.inputs import InputRequest
from runlane.types import Run

Record = dict[str, Any]

SHORT = 2000
"""Maximum number of characters of a text that is neither the output of a run nor a question."""

LABEL = 200
"""Maximum number of characters of a label. A run has up to 64."""


def visible(value: Any, limit: int = SHORT) -> Any:
    """Escapes and cuts all texts in a JSON value; leaves out what is None."""
    match value:
        case str():
            return cut(value, limit)
        case Mapping():
            return {
                cut(key, limit): visible(each, LABEL if key == "metadata" else limit)
                for key, each in value.items()
                if each is not None
            }
        case list() | tuple():
            return [visible(each, limit) for each in value]
        case _:
            return value


def cut(text: str, limit: int) -> str:
    """Escapes the beginning of a text, and says how much was cut off."""
    more = len(text) - limit
    return escaped(text) if more <= 0 else f"{escaped(text[:limit])}… ({more} more characters)"


def record(value: object, limit: int = SHORT) -> Record:
    """Converts a record of the client to JSON."""
    found: Record = visible(to_json(value), limit)
    return found


def run_record(run: Run) -> Record:
    """Converts a run, without the text of its end."""
    fields = to_json(run)
    if fields["run_complete"] is not None:
        fields["run_complete"].pop("text")
    found: Record = visible(fields)
    return found


def text_fields(text: str, limit: int, offset: int = 0) -> Record:
    """Returns a piece of an output, its place, and the place of the next piece if there is one."""
    end = min(offset + limit, len(text))
    fields: Record = {"text": escaped(text[offset:end]), "text_length": len(text)}
    return {**fields, "next_text_offset": end} if end < len(text) else fields


def is_whole(request: InputRequest, limit: int) -> bool:
    """Whether nothing of a question is cut at this limit; only then may it be answered here."""
    texts = (request.text, request.arguments_json, request.schema_json, *request.choices)
    return all(len(text) <= limit for text in texts)


def error_text(error: RunlaneError) -> str:
    """Describes the error of a call: its reason, its message, and the invalid fields."""
    reason = error.reason or error.status.name
    violations = (f"{each.field}: {each.description}" for each in error.violations)
    missing = [each for each in violations if each not in error.message]
    parts = [f"{reason}: {error.message}", *missing]
    if error.retry_after is not None:
        parts.append(f"retry after {error.retry_after.total_seconds():g} s")
    if run_id := error.metadata.get("run_id"):
        parts.append(f"the outcome is unknown; repeat the call with run_id {run_id!r}")
    return cut("; ".join(parts), SHORT)
