"""Checks the consistency of a database file."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from runlane_server.store.sqlfiles import statements
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
        db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        problems = [*_integrity(db)]
        for name, sql in CHECKS.items():
            problems += _run(db, name, sql)
        return Findings(tuple(problems), None if problems else counts(db))


def counts(db: sqlite3.Connection) -> Counts:
    """The number of rows in a database."""
    return Counts(*db.execute(_COUNTS).fetchone())


def _integrity(db: sqlite3.Connection) -> Iterator[str]:
    for line in _run(db, "integrity", f"PRAGMA integrity_check({MAX_LINES})"):
        if line != "integrity: ok":
            yield " ".join(line.split())


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
