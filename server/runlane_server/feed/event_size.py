"""The size of events in memory."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import cache
from sys import getsizeof
from typing import Any

from runlane_server.core.model import EventBody


def event_size(body: EventBody) -> int:
    """The bytes of all texts and contents of an event, in all fields.

    It is the size in memory, not that in UTF-8: a single character may make a text take four
    bytes for each.
    """
    return _size(body)


def _size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return getsizeof(value)
    if isinstance(value, tuple):
        return sum(map(_size, value))
    return sum(_size(getattr(value, name)) for name in _field_names(value.__class__))


@cache
def _field_names(kind: type[Any]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind)) if is_dataclass(kind) else ()
