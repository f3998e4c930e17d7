"""Repairs the damaged records of a database file that no server uses."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from typing import Any

from runlane_server.core.errors import StartError
from runlane_server.core.model import RunKey, SessionKey
from runlane_server.store.codec import RUN_COMPLETE
from runlane_server.store.corrupt import is_corrupt
from runlane_server.store.repair import (
    CORRUPT_KIND,
    CORRUPT_PROMPT,
    EMPTY_BODY,
    is_damaged,
    message_values,
    name_of,
    remove_sessions,
    terminal_body,
    time_of,
)
from runlane_server.store.sqlite import queries
from runlane_server.store.sqlite.check import READS
from runlane_server.store.sqlite.connection import any_text
from runlane_server.store.sqlite.copies import copied_message
from runlane_server.store.sqlite.file import check_ours
from runlane_server.store.sqlite.lock import FileLock
from runlane_server.store.sqlite.names import replace_names
from runlane_server.store.sqlite.store import SqliteStore
from runlane_server.store.sqlite.transaction import SQL


async def repair(path: Path) -> list[str]:
    """Repairs a file, which must exist; returns a line for each change. Raises StartError, also
    while a server runs.

    The records are replaced in one transaction; then damaged sessions are removed one by one.
    """
    # Opened as a server does, which migrates an older file.
    async with SqliteStore(path):
        pass
    try:
        lines, sessions = _replace(path)
    except sqlite3.Error as error:
        raise StartError(f"repair {path}: {error}") from error
    if sessions:
        async with SqliteStore(path) as store:
            lines += await remove_sessions(store, sessions)
    return lines


def _replace(path: Path) -> tuple[list[str], list[SessionKey]]:
    """Replaces damaged records; returns a line for each, and the sessions to remove."""
    lock = FileLock(path)
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.row_factory = sqlite3.Row
            db.text_factory = any_text
            check_ours(db, path)
            db.execute("PRAGMA synchronous = FULL")
            db.execute("BEGIN IMMEDIATE")
            renamed = replace_names(db)
            sessions = sorted(set(_damaged_sessions(db)))
            lines = [
                replace(db, row)
                for table, replace in _REPLACE.items()
                for row in _damaged(db, table)
            ]
            db.execute("COMMIT")
            return [*renamed, *lines], sessions
    finally:
        lock.release()


def _damaged(db: sqlite3.Connection, table: str) -> list[Any]:
    rows = db.execute(f"SELECT *, 0 AS last_event_index FROM {table}")  # noqa: S608 - a constant
    read = READS[table]
    return [row for row in rows if is_damaged(lambda row=row: read(db, row))]  # type: ignore[misc]


def _damaged_sessions(db: sqlite3.Connection) -> Iterator[SessionKey]:
    for table in ("sessions", "runs", "input_requests"):
        for row in _damaged(db, table):
            yield SessionKey(row["tenant"], row["session_id"])


def _message(db: sqlite3.Connection, row: Any) -> str:
    place = (row["tenant"], row["session_id"], row["turn"], row["ordinal"])
    db.execute(
        "UPDATE messages SET role = ?, finish_reason = ?, model = ?, created_at = ?, parts = ?"
        " WHERE tenant = ? AND session_id = ? AND turn = ? AND ordinal = ?",
        (*message_values(row), *place),
    )
    db.execute(SQL["recount_stored_bytes"], {"tenant": place[0], "session_id": place[1]})
    return f"{name_of('message', row['tenant'], row['message_id'])} was replaced"


def _copied_message(db: sqlite3.Connection, row: Any) -> str:
    copy_id, *_ = place = (row["copy_id"], row["turn"], row["ordinal"])
    db.execute(
        "UPDATE copied_messages SET role = ?, finish_reason = ?, model = ?, created_at = ?,"
        " parts = ? WHERE copy_id = ? AND turn = ? AND ordinal = ?",
        (*message_values(row), *place),
    )
    mended = db.execute(
        "SELECT * FROM copied_messages WHERE copy_id = ? AND turn = ? AND ordinal = ?", place
    ).fetchone()
    if is_damaged(lambda: copied_message(db, copy_id, mended)):
        # What is left is the prompt, which belongs to the message itself.
        db.execute(
            "UPDATE copied_messages SET prompt = ?, attachments = 0"
            " WHERE copy_id = ? AND turn = ? AND ordinal = ?",
            (CORRUPT_PROMPT, *place),
        )
        db.execute(
            "DELETE FROM copied_attachments WHERE copy_id = ? AND turn = ? AND ordinal = ?", place
        )
    forks = db.execute("SELECT tenant, session_id FROM sessions WHERE copy_id = ?", (copy_id,))
    for fork in forks.fetchall():
        db.execute(SQL["recount_stored_bytes"], dict(fork))
    return f"{name_of('message', f'copy {copy_id}', row['message_id'])} was replaced"


def _run_event(db: sqlite3.Connection, row: Any) -> str:
    key = (row["tenant"], row["run_id"], row["idx"])
    named = dict(zip(("tenant", "run_id", "idx"), key, strict=True))
    is_end = db.execute(SQL["is_end"], named).fetchone()[0]
    kind, body = (RUN_COMPLETE, None) if is_end else (CORRUPT_KIND, EMPTY_BODY)
    db.execute(
        "UPDATE run_events SET at = ?, kind = ?, body = ?"
        " WHERE tenant = ? AND run_id = ? AND idx = ?",
        (time_of(row["at"]), kind, body, *key),
    )
    return f"{name_of('event', *key)} was replaced"


def _logged(db: sqlite3.Connection, row: Any) -> str:
    run = queries.run(db, RunKey(row["tenant"], row["run_id"]))
    body = terminal_body(row, None if run is None or is_corrupt(run) else run)
    db.execute("UPDATE events SET body = ? WHERE position = ?", (body, row["position"]))
    return f"{name_of('terminal event of run', row['tenant'], row['run_id'])} was replaced"


def _deleted_run(db: sqlite3.Connection, row: Any) -> str:
    key = (row["tenant"], row["run_id"])
    db.execute("DELETE FROM deleted_runs WHERE tenant = ? AND run_id = ?", key)
    return f"{name_of('deleted run', *key)} was removed"


_REPLACE: Mapping[str, Callable[[sqlite3.Connection, Any], str]] = MappingProxyType(
    {
        "messages": _message,
        "copied_messages": _copied_message,
        "run_events": _run_event,
        "events": _logged,
        "deleted_runs": _deleted_run,
    }
)
"""How the damaged rows of a table are replaced."""
