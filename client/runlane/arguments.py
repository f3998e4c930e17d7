"""Builds requests from the arguments of callers, and names the argument that has a wrong type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

MessageT = TypeVar("MessageT", bound=Message)

_EXPECTED = {
    FieldDescriptor.CPPTYPE_STRING: "a str",
    FieldDescriptor.CPPTYPE_INT32: "an int",
    FieldDescriptor.CPPTYPE_INT64: "an int",
    FieldDescriptor.CPPTYPE_BOOL: "a bool",
}


def build(kind: type[MessageT], **arguments: Any) -> MessageT:
    """Returns a message whose fields are the arguments of the same names.

    Raises TypeError for a value of a wrong type, and ValueError for one that no message can hold;
    both name the argument. protobuf's own errors do not.
    """
    try:
        return kind(**arguments)
    except (TypeError, ValueError, AttributeError):
        for name, value in arguments.items():
            _check(kind, name, value)
        raise


def _check(kind: type[Message], name: str, value: object) -> None:
    """Raises TypeError or ValueError if the field cannot hold the value."""
    described = kind.DESCRIPTOR.fields_by_name[name]
    if _fits(kind, name, value):
        return
    entry = described.message_type
    if entry is None or not entry.GetOptions().map_entry:
        raise _error(name, value, _EXPECTED.get(described.cpp_type, "another type"))
    if not isinstance(value, Mapping):
        raise _error(name, value, "a mapping of str to str")
    for key, each in value.items():
        if not _fits(kind, name, {key: ""}):
            raise _error(f"a key of {name}", key, "a str")
        if not _fits(kind, name, {key: each}):
            raise _error(f"{name}[{key!r}]", each, "a str")


def _fits(kind: type[Message], name: str, value: object) -> bool:
    try:
        kind(**{name: value})
    except (TypeError, ValueError, AttributeError):
        return False
    return True


def _error(name: str, value: object, expected: str) -> Exception:
    if isinstance(value, str) and expected == "a str":
        return ValueError(f"{name}: contains a lone surrogate, which is not valid text")
    if isinstance(value, int) and expected == "an int":
        return ValueError(f"{name}: {value} is out of range")
    return TypeError(f"{name}: expected {expected}, not {type(value).__name__}")
