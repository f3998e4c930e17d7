"""Makes the request of an rpc from the path, the query and the body of an HTTP request."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from runlane_web.errors import invalid, shown
from runlane_web.routes import Route

MAX_DEPTH = 32
"""Maximum depth of a JSON body. The deepest request that the protos describe has four levels."""

MAX_ELEMENTS = 4096
"""Maximum number of members and list elements in a JSON body; that of a message of the server."""

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")
_PLACE = re.compile(r' at "?[A-Za-z]+\.(?P<path>[\w.\[\]]+)"?\.?')
_NO_FIELD = re.compile(r'has no field named "(?P<name>[^"]*)"')
_FAILED = re.compile(r"^Failed to parse (?P<name>\w+) field: (?P<why>.*)$", re.DOTALL)


def decode(
    route: Route, path: Mapping[str, str], query: Iterable[tuple[str, str]], body: bytes
) -> Message:
    """Decodes a request.

    Args:
        route: The route.
        path: The fields that stand in the path.
        query: The parameters of the query; ignored names do not exist.
        body: The body; for a route without one it must be empty.

    Raises:
        Refused: A field is unknown, has a value of another type, or is given twice.
    """
    fields = parse_object(body) if route.body else _no_body(body)
    descriptor = route.rpc.input_type
    parameters = list(query)
    if route.body and parameters:
        name = parameters[0][0]
        raise invalid(shown(name), "is in the query; this request takes it in the body")
    _refuse_two_spellings(fields, descriptor)
    _add_query(fields, descriptor, parameters)
    _add_path(fields, descriptor, path)
    try:
        return json_format.ParseDict(fields, route.request())
    except json_format.ParseError as error:
        _raise(error)
    except Exception as error:  # noqa: BLE001 - its kinds are not documented: OverflowError, ...
        raise invalid("body", _plain(str(error))) from None


def parse_object(body: bytes) -> dict[str, Any]:
    """Parses a body as a JSON object; an empty body is an empty one. Raises Refused."""
    if not body.strip():
        return {}
    _check_count(body)
    try:
        value = json.loads(body, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise invalid("body", f"is nested more than {MAX_DEPTH} levels deep") from None
    except UnicodeDecodeError as error:
        raise invalid("body", f"is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        problem = f"is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg})"
        raise invalid("body", problem) from None
    except ValueError as error:
        raise invalid("body", str(error)) from None
    if not isinstance(value, dict):
        raise invalid("body", "must be a JSON object")
    _check_shape(value)
    return value


def _no_body(body: bytes) -> dict[str, Any]:
    if body:
        raise invalid("body", "must be empty; this request takes its fields in the query")
    return {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A name that comes twice is refused: two readers could take it for different values."""
    for name, _ in pairs:
        if not _is_unicode(name):
            raise invalid(shown(name), "does not exist")
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise invalid(shown(name), "is given twice")
            seen.add(name)
    return made


def _is_unicode(text: str) -> bool:
    """False for half of a surrogate pair, which protobuf's parser takes for a bug of its own."""
    return text.isascii() or not _SURROGATE.search(text)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"is not valid JSON ({name} is no number)")


def _check_count(body: bytes) -> None:
    """Refuses what has far too many elements before it is parsed, which would take long."""
    if len(body) <= MAX_ELEMENTS:
        return
    bare = _STRING.sub(b"", body)
    if max(bare.count(b","), bare.count(b"[") + bare.count(b"{")) > MAX_ELEMENTS + 1:
        raise invalid("body", f"has more than {MAX_ELEMENTS} elements")


def _check_shape(value: Any) -> None:
    """Limits depth and number of elements, which cost far more memory once they are parsed."""
    free = MAX_ELEMENTS
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            free -= len(item)
            if free < 0:
                raise invalid("body", f"has more than {MAX_ELEMENTS} elements")
            children = item.values() if isinstance(item, dict) else item
            below += [child for child in children if isinstance(child, dict | list)]
        if not below:
            return
        level = below
    raise invalid("body", f"is nested more than {MAX_DEPTH} levels deep")


def _field(descriptor: Descriptor, name: str) -> FieldDescriptor | None:
    for field in descriptor.fields:
        if name in (field.name, field.json_name):
            return field
    return None


def _refuse_two_spellings(fields: dict[str, Any], descriptor: Descriptor) -> None:
    """A field may be spelled `session_id` or `sessionId`, and not both."""
    seen: set[str] = set()
    for name, value in fields.items():
        field = _field(descriptor, name)
        if field is None:
            continue
        if field.name in seen:
            raise invalid(name, "is given twice")
        seen.add(field.name)
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                _refuse_two_spellings(each, field.message_type)


def _add_query(
    fields: dict[str, Any], descriptor: Descriptor, query: list[tuple[str, str]]
) -> None:
    for name, text in query:
        field = _field(descriptor, name)
        if field is None:
            raise invalid(shown(name), "does not exist")
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            raise invalid(name, "cannot stand in a query")
        value = _query_value(field, text)
        if field.is_repeated:
            fields.setdefault(field.name, []).append(value)
        elif field.name in fields:
            raise invalid(name, "is given twice")
        else:
            fields[field.name] = value


def _query_value(field: FieldDescriptor, text: str) -> Any:
    """A parameter as a JSON value. A number may stay a string in protobuf's JSON."""
    if field.cpp_type != FieldDescriptor.CPPTYPE_BOOL:
        return text
    if text not in ("true", "false"):
        raise invalid(field.name, f"must be true or false, not {text[:40]!r}")
    return text == "true"


def _add_path(fields: dict[str, Any], descriptor: Descriptor, path: Mapping[str, str]) -> None:
    for name, value in path.items():
        field = descriptor.fields_by_name[name]
        for spelling in {field.name, field.json_name} & fields.keys():
            if fields.pop(spelling) not in (value, [value]):
                raise invalid(name, "differs from the one in the path")
        fields[name] = [value] if field.is_repeated else value


def _raise(error: json_format.ParseError) -> NoReturn:
    """Names the field and the problem of an error of protobuf's parser."""
    text = _PLACE.sub("", str(error)).rstrip(".")
    path: list[str] = []
    while (outer := _FAILED.match(text)) is not None:
        path.append(outer["name"])
        text = outer["why"]
    unknown = _NO_FIELD.search(text)
    if unknown is not None:
        path.append(shown(unknown["name"]))
        text = "does not exist"
    elif not path and (place := _PLACE.search(str(error))) is not None:
        path.append(place["path"])
    raise invalid(".".join(path) or "body", _plain(text)) from None


def _plain(problem: str) -> str:
    """A problem in words that do not depend on Python."""
    if "expected string or bytes-like object" in problem:
        return "must be a text"
    if problem.startswith("invalid literal for int()"):
        return "must be a whole number"
    return shown(problem, 200)


KEYS = {"RunAccepted": "run_id", "UpdateRun": "update_id"}
"""The field of each rpc that the header Idempotency-Key stands for."""


def set_key(message: Message, field: str, key: str) -> None:
    """Takes the header Idempotency-Key for a field of `KEYS`.

    Raises:
        Refused: The body has another value, or the header's value is too long.
    """
    present = getattr(message, field)
    if present and present != key:
        raise invalid(field, "differs from the header Idempotency-Key")
    setattr(message, field, key)
