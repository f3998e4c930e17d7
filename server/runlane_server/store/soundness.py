"""Verifies records that were read from a database: every value has its type and its range.

A row may hold anything: another program, a damaged disk or an older defect wrote it. A record that
passes can be encoded for callers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from runlane_server.core.model import utf8_size

Record = TypeVar("Record")

Measure = Callable[[Any], int]
"""Verifies a value and returns its size in bytes. Raises Unsound."""

MAX_RECORD_BYTES = (4 << 20) - (64 << 10)
"""Maximum size of a record, and of each part of a message, in bytes: gRPC refuses messages above
4 MiB by default, and the server writes none of more than 3 MiB."""

_MAX_INT = (1 << 63) - 1
_MAX_INT32 = (1 << 31) - 1
_MAX_TIME = 253_402_300_799_999_999
"""The last microsecond of the year 9999, where the protobuf type Timestamp ends."""

_SMALL = frozenset({"attempt", "max_attempts", "waiting_runs"})
"""Fields of 32 bits on the wire."""

_TIMES = frozenset(
    {
        *("at", "accepted_at", "started_at", "ended_at", "created_at", "updated_at"),
        *("requested_at", "expires_at", "closed_at"),
    }
)

_SIGNED = frozenset({"rank"})

_SEPARATE = frozenset({"parts", "attachments"})
"""Fields whose items go into separate messages on the wire."""


class Unsound(ValueError):
    """A value has the wrong type or is out of range; the message names the field."""


def verified(record: Record) -> Record:
    """Returns the record. Raises Unsound if one of its values is not sound."""
    _size_of_record(record)
    return record


def _size_of_record(record: Any) -> int:
    total = 0
    kind = type(record)
    fields = _FIELDS.get(kind) or _FIELDS.setdefault(kind, _fields(kind))
    for field, measure in fields:
        value = getattr(record, field)
        try:
            size = measure(value)
        except ValueError as error:
            raise Unsound(f"{field}: {error}") from None
        if field not in _SEPARATE:
            total += size
    if total > MAX_RECORD_BYTES:
        raise Unsound(f"{total} bytes; {MAX_RECORD_BYTES} is the limit")
    return total


_FIELDS: dict[type[Any], tuple[tuple[str, Measure], ...]] = {}
"""The fields of each class that was verified."""


def _fields(kind: type[Any]) -> tuple[tuple[str, Measure], ...]:
    """The fields of a class of records, with the function that verifies each of them."""
    if not kind.__module__.startswith("runlane_server."):
        raise Unsound(f"a record of type {kind.__name__}")
    hints = get_type_hints(kind)
    return tuple((name, _measure(name, hint)) for name, hint in hints.items())


def _measure(name: str, hint: Any) -> Measure:  # noqa: PLR0911 - one per kind of type
    origin = get_origin(hint)
    if origin in {Union, UnionType}:
        return _measure_union(name, get_args(hint))
    if origin in {tuple, frozenset}:
        return _measure_items(_measure(name, get_args(hint)[0]), origin)
    if origin is Mapping:
        return _labels
    if hint is str:
        return _text
    if hint is int:
        return _measure_int(name)
    if hint in {bool, bytes}:
        return _measure_exact(hint)
    if issubclass(hint, Enum):
        return _measure_exact(hint)
    return _measure_record((hint,))


def _measure_union(name: str, hints: tuple[Any, ...]) -> Measure:
    """A union of records, or of types that cannot be confused with each other."""
    present = tuple(hint for hint in hints if hint is not type(None))
    if len(present) == len(hints) and all(hasattr(hint, "__match_args__") for hint in present):
        return _measure_record(present)
    by_type = {hint: _measure(name, hint) for hint in present}

    def measure(value: Any) -> int:
        if value is None and len(present) < len(hints):
            return 0
        known = by_type.get(type(value))
        if known is None:
            raise Unsound(f"is a {type(value).__name__}")
        return known(value)

    return measure


def _measure_items(item: Measure, collection: type[Any]) -> Measure:
    def measure(values: Any) -> int:
        if type(values) is not collection:
            raise Unsound(f"is a {type(values).__name__}")
        return sum(map(item, values))

    return measure


def _measure_record(kinds: tuple[type[Any], ...]) -> Measure:
    def measure(value: Any) -> int:
        if type(value) not in kinds:
            raise Unsound(f"is a {type(value).__name__}")
        return _size_of_record(value)

    return measure


def _measure_exact(kind: type[Any]) -> Measure:
    def measure(value: Any) -> int:
        if type(value) is not kind:
            raise Unsound(f"is a {type(value).__name__}")
        return len(value) if isinstance(value, bytes) else 0

    return measure


def _measure_int(name: str) -> Measure:
    low = -_MAX_INT if name in _SIGNED else 0
    high = _MAX_INT32 if name in _SMALL else _MAX_TIME if name in _TIMES else _MAX_INT

    def measure(value: Any) -> int:
        if type(value) is not int:
            raise Unsound(f"is a {type(value).__name__}")
        if not low <= value <= high:
            raise Unsound(f"{value} is out of range")
        return 0

    return measure


def _text(value: Any) -> int:
    if type(value) is not str:
        raise Unsound(f"is a {type(value).__name__}")
    try:
        return utf8_size(value)
    except UnicodeEncodeError:
        raise Unsound("is not UTF-8") from None


def _labels(value: Any) -> int:
    if not isinstance(value, Mapping):
        raise Unsound(f"is a {type(value).__name__}")
    return sum(_text(key) + _text(label) for key, label in value.items())
