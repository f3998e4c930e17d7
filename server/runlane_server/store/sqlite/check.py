"""Checks the consistency of a database file."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from runlane_server.core.errors import CorruptRecord
from runlane_server.core.model import KeptPart, Prompt, RunKey, SessionKey
from runlane_server.store.corrupt import collecting, corrupt_complete
from runlane_server.store.findings import MAX_LINES, Counts, Findings, first_lines
from runlane_server.store.inputs import input_from
from runlane_server.store.records import (
    deleted_run_from,
    event_from,
    logged_from,
    message_from,
    run_from,
    session_from,
)
from runlane_server.store.sqlfiles import statements
from runlane_server.store.sqlite import queries
from runlane_server.store.sqlite.connection import any_text, as_is
from runlane_server.store.sqlite.copies import copied_message
from runlane_server.store.sqlite.names import unsound_names
from runlane_server.store.sqlite.snapshot import snapshot_of

CHECKS = statements("sqlite", "checks")

CACHE_KIB = 256 << 10
"""The page cache, in KiB: a check reads most of the file several times."""

_COUNTS = """
SELECT
    (SELECT count(*) FROM sessions) AS sessions,
    (SELECT count(*) FROM runs) AS runs,
    (SELECT count(*) FROM events) AS events
"""


def check(path: Path) -> Findings:
    """Checks one snapshot of a file; a server may use it at the same time. Raises StartError."""
    with snapshot_of(path) as db:
        db.row_factory = sqlite3.Row
        db.text_factory = any_text
        db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        problems = [*_integrity(db), *_names(db), *_records(db)]
        for name, sql in CHECKS.items():
            problems += _run(db, name, sql)
        problems = [line.encode(errors="replace").decode() for line in problems]
        return Findings(tuple(problems), None if problems else counts(db))


def counts(db: sqlite3.Connection) -> Counts:
    """The number of rows in a database."""
    return Counts(*db.execute(_COUNTS).fetchone())


def _integrity(db: sqlite3.Connection) -> Iterator[str]:
    for line in _run(db, "integrity", f"PRAGMA integrity_check({MAX_LINES})"):
        if line != "integrity: ok":
            yield " ".join(line.split())


def _names(db: sqlite3.Connection) -> Iterator[str]:
    try:
        yield from first_lines("names", unsound_names(db))
    except sqlite3.Error as error:
        yield f"names: {error}"


def _records(db: sqlite3.Connection) -> Iterator[str]:
    """Reads every row as the server does."""
    for table, read in READS.items():
        with collecting() as lines:
            try:
                for row in db.execute(f"SELECT *, 0 AS last_event_index FROM {table}"):  # noqa: S608 - a constant
                    # It is collected, or was found as a name that is not UTF-8.
                    with suppress(CorruptRecord, UnicodeEncodeError):
                        read(db, row)
            except sqlite3.Error as error:
                lines.append(f"{table}: {error}")
        yield from first_lines("records", dict.fromkeys(lines))


def _read_session(db: sqlite3.Connection, row: sqlite3.Row) -> None:
    session_from(row["tenant"], row, as_is)
    queries.lane(db, SessionKey(row["tenant"], row["session_id"]))


def _read_run(db: sqlite3.Connection, row: sqlite3.Row) -> None:
    run_from(row["tenant"], row, as_is)
    queries.prompt(db, RunKey(row["tenant"], row["run_id"]))


def _read_message(db: sqlite3.Connection, row: sqlite3.Row) -> None:
    def read_kept(place: KeptPart) -> str | None:
        return queries.kept_part(db, row["tenant"], row["run_id"], place)

    # Its prompt is read with its run.
    message_from(row["tenant"], row, as_is, lambda: Prompt(""), read_kept)


def _read_copied(db: sqlite3.Connection, row: sqlite3.Row) -> None:
    copied_message(db, row["copy_id"], row)


def _read_event(_: sqlite3.Connection, row: sqlite3.Row) -> None:
    end = corrupt_complete("", "")
    event_from(RunKey(row["tenant"], row["run_id"]), row, lambda: end)


def _read_deleted_run(_: sqlite3.Connection, row: sqlite3.Row) -> None:
    deleted_run_from(RunKey(row["tenant"], row["run_id"]), row, as_is)


READS: Mapping[str, Callable[[sqlite3.Connection, sqlite3.Row], object]] = MappingProxyType(
    {
        "sessions": _read_session,
        "runs": _read_run,
        "messages": _read_message,
        "copied_messages": _read_copied,
        "run_events": _read_event,
        "events": lambda _, row: logged_from(row, as_is),
        "deleted_runs": _read_deleted_run,
        "input_requests": lambda _, row: input_from(row["tenant"], row, as_is),
    }
)
"""How the rows of a table are read. Prompts and attachments are read with their runs."""


def _run(db: sqlite3.Connection, name: str, sql: str) -> Iterator[str]:
    try:
        yield from first_lines(name, (problem for (problem,) in db.execute(sql)))
    except sqlite3.Error as error:
        # Other tables of a damaged file may still be readable.
        yield f"{name}: {error}"
