"""Checks the consistency of a database file."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType

from runlane_server.core.errors import CorruptRecord
from runlane_server.core.model import Prompt, RunKey, SessionKey
from runlane_server.store.corrupt import collecting, corrupt_complete
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
from runlane_server.store.sqlite.snapshot import snapshot_of

CHECKS = statements("sqlite", "checks")

MAX_LINES = 20
"""The most lines that one check prints, as one cause may affect a million rows."""

CACHE_KIB = 256 << 10
"""The page cache, in KiB: a check reads most of the file several times."""

_COUNTS = """
SELECT
    (SELECT count(*) FROM sessions) AS sessions,
    (SELECT count(*) FROM runs) AS runs,
    (SELECT count(*) FROM events) AS events
"""


@dataclass(frozen=True, slots=True)
class Counts:
    """The number of rows in a database, by kind."""

    sessions: int
    runs: int
    events: int


@dataclass(frozen=True, slots=True)
class Findings:
    """The outcome of a check: one line for each problem, which begins with the name of the check;
    `counts` only if there are none."""

    problems: tuple[str, ...]
    counts: Counts | None


def check(path: Path) -> Findings:
    """Checks one snapshot of a file; a server may use it at the same time. Raises StartError."""
    with snapshot_of(path) as db:
        db.row_factory = sqlite3.Row
        db.text_factory = any_text
        db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        problems = [*_integrity(db), *_records(db)]
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


def _records(db: sqlite3.Connection) -> Iterator[str]:
    """Reads every row as the server does."""
    for table, read in _READS.items():
        with collecting() as lines:
            try:
                for row in db.execute(f"SELECT * FROM {table}"):  # noqa: S608 - a constant
                    with suppress(CorruptRecord):  # it is collected
                        read(db, row)
            except sqlite3.Error as error:
                lines.append(f"{table}: {error}")
        yield from _first(f"records: {line}" for line in dict.fromkeys(lines))


def _read_session(db: sqlite3.Connection, row: sqlite3.Row) -> None:
    session_from(row["tenant"], row, as_is)
    queries.lane(db, SessionKey(row["tenant"], row["session_id"]))


def _read_run(db: sqlite3.Connection, row: sqlite3.Row) -> None:
    run_from(row["tenant"], row, as_is)
    queries.prompt(db, RunKey(row["tenant"], row["run_id"]))


def _read_message(_: sqlite3.Connection, row: sqlite3.Row) -> None:
    # Its prompt is read with its run.
    message_from(row["tenant"], row, as_is, lambda: Prompt(""))


def _read_event(_: sqlite3.Connection, row: sqlite3.Row) -> None:
    end = corrupt_complete("", "")
    event_from(RunKey(row["tenant"], row["run_id"]), row, lambda: end)


def _read_deleted_run(_: sqlite3.Connection, row: sqlite3.Row) -> None:
    deleted_run_from(RunKey(row["tenant"], row["run_id"]), row, as_is)


_READS: Mapping[str, Callable[[sqlite3.Connection, sqlite3.Row], object]] = MappingProxyType(
    {
        "sessions": _read_session,
        "runs": _read_run,
        "messages": _read_message,
        "run_events": _read_event,
        "events": lambda _, row: logged_from(row, as_is),
        "deleted_runs": _read_deleted_run,
    }
)
"""How the rows of a table are read. Prompts and attachments are read with their runs."""


def _first(lines: Iterable[str]) -> Iterator[str]:
    """The first lines, and the number of the others."""
    rest = iter(lines)
    yield from islice(rest, MAX_LINES)
    if more := sum(1 for _ in rest):
        yield f"and {more} more"


def _run(db: sqlite3.Connection, name: str, sql: str) -> Iterator[str]:
    try:
        found = db.execute(sql)
        for (problem,) in islice(found, MAX_LINES):
            yield f"{name}: {problem}"
        if more := sum(1 for _ in found):
            yield f"{name}: and {more} more"
    except sqlite3.Error as error:
        # Other tables of a damaged file may still be readable.
        yield f"{name}: {error}"
