"""Replaces names that are not UTF-8 in the rows of a database file.

Nobody can name such a row to read or remove it. It gets the hexadecimal form of its bytes as its
name, in every column that refers to it, so that a run stays that of its session.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from runlane_server.store.corrupt import MARK

MAX_NAME = 128
"""Characters of the longest name that a caller may use."""

_OF_RUN = ("tenant", "run_id")

COLUMNS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "sessions": ("tenant", "session_id", "active_run_id"),
        "runs": (*_OF_RUN, "session_id", "folded_into", "message_id"),
        "prompts": _OF_RUN,
        "attachments": _OF_RUN,
        "messages": (*_OF_RUN, "session_id", "message_id"),
        "run_events": _OF_RUN,
        "events": (*_OF_RUN, "session_id"),
        "deleted_runs": (*_OF_RUN, "session_id"),
        "tenant_logs": ("tenant",),
        "input_requests": (*_OF_RUN, "session_id", "input_request_id"),
        "kept_parts": _OF_RUN,
        "copied_messages": ("run_id", "message_id"),
        "copied_parts": ("run_id",),
    }
)
"""The columns of each table that hold names."""


def unsound_names(db: sqlite3.Connection) -> Iterator[str]:
    """Yields a line for each name of a table that is not UTF-8."""
    for table, column, name in _unsound(db):
        yield f"a {column} of {table} is not UTF-8: {name}"


def replace_names(db: sqlite3.Connection) -> list[str]:
    """Replaces them within the transaction; returns a line for each name of a table."""
    found = list(_unsound(db))
    for table, column in dict.fromkeys((table, column) for table, column, _ in found):
        db.execute(
            f"UPDATE {table} SET {column} = sound_name(CAST({column} AS BLOB))"  # noqa: S608
            f" WHERE {_is_bad(column)}"
        )
    return [
        f"a {column} of {table} that is not UTF-8 was replaced by {name}"
        for table, column, name in found
    ]


def _unsound(db: sqlite3.Connection) -> Iterator[tuple[str, str, str]]:
    """Yields table, column and replacement of each name that is not UTF-8."""
    db.create_function("is_unsound", 1, _is_unsound, deterministic=True)
    db.create_function("sound_name", 1, _sound_name, deterministic=True)
    for table, columns in COLUMNS.items():
        for column in columns:
            names = f"SELECT DISTINCT CAST({column} AS BLOB) FROM {table} WHERE {_is_bad(column)}"  # noqa: S608
            yield from ((table, column, _sound_name(name)) for (name,) in db.execute(names))


def _is_bad(column: str) -> str:
    return f"(typeof({column}) = 'blob' OR is_unsound(CAST({column} AS BLOB)))"


def _is_unsound(name: bytes | None) -> bool:
    if name is None:
        return False
    try:
        name.decode()
    except UnicodeDecodeError:
        return True
    return False


def _sound_name(name: bytes) -> str:
    text = MARK + name.hex()
    if len(text) <= MAX_NAME:
        return text
    digest = hashlib.sha256(name).hexdigest()[:32]
    return f"{text[: MAX_NAME - len(digest) - 1]}-{digest}"
