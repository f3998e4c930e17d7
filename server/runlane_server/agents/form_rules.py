"""The rules for a JSON Schema of an agent, and for an answer to its form.

Schema and answer are hostile: a pattern can take hours, references and `uniqueItems` minutes, and
nothing can interrupt them. `is_cheap` says for which pairs the check takes a moment; all others
belong into a process that can be ended (`form_checks`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from jsonschema.exceptions import SchemaError  # type: ignore[import-untyped]
from referencing import Registry

MAX_VIOLATIONS = 20
MAX_TEXT = 500
"""Characters of the path or the description of a violation."""

CHEAP_SCHEMA_BYTES = 1 << 10
CHEAP_PRODUCT = 1 << 16
"""Bytes of a schema, and of a schema times those of an answer, which are checked at once."""

_CHEAP = frozenset(
    {
        *("type", "title", "description", "examples", "enum", "const", "default", "format"),
        *("required", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
        *("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
    }
)
"""Keywords without parts, whose check takes no longer than their value is long."""

_PART, _LIST, _MAP = {"items", "additionalProperties"}, {"anyOf", "allOf", "oneOf"}, "properties"
"""Keywords whose parts are each checked once for each part of a value."""


def is_cheap(schema: str, value: str = "") -> bool:
    """Whether a check takes at most some milliseconds."""
    if len(schema) > CHEAP_SCHEMA_BYTES or len(schema) * len(value) > CHEAP_PRODUCT:
        return False
    try:
        return _is_cheap(json.loads(schema))
    except (ValueError, RecursionError):
        return False


def _is_cheap(schema: Any) -> bool:
    if not isinstance(schema, dict):
        return isinstance(schema, bool)
    return all(_is_cheap_keyword(name, value) for name, value in schema.items())


def _is_cheap_keyword(name: str, value: Any) -> bool:
    if name in _CHEAP:
        return True
    if name in _PART:
        return _is_cheap(value)
    if name in _LIST:
        return isinstance(value, list) and all(map(_is_cheap, value))
    return name == _MAP and isinstance(value, dict) and all(map(_is_cheap, value.values()))


def schema_problem(text: str) -> str:
    """The faults of a schema; empty if it has none."""
    try:
        schema = json.loads(text)
        Draft202012Validator.check_schema(schema)
        foreign = next((it for it in _references(schema) if not it.startswith("#")), None)
    except SchemaError as error:
        return f"schema is no JSON Schema: {error.message[:MAX_TEXT]}"
    except RecursionError:
        return "schema is no JSON Schema: it is nested too deeply"
    if foreign is not None:
        return f"schema refers to {foreign[:MAX_TEXT]!r}; only its own parts are possible"
    return ""


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        for name, value in schema.items():
            if name in {"$ref", "$dynamicRef"} and isinstance(value, str):
                yield value
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def violations(schema: str, value: str) -> Sequence[tuple[str, str]]:
    """Path and description of what is wrong with an answer.

    Raises any exception: a schema may break its own validation.
    """
    found = []
    validator = Draft202012Validator(json.loads(schema), registry=Registry())
    for error in validator.iter_errors(json.loads(value)):
        path = "".join(f"[{json.dumps(part)}]" for part in error.absolute_path)
        found.append((path[:MAX_TEXT], error.message[:MAX_TEXT]))
        if len(found) >= MAX_VIOLATIONS:
            break
    return found
