"""Whether a database file holds what always has to hold."""

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
"""How much one check tells of, as a single cause may be wrong with a million rows."""

CACHE_KIB = 256 << 10
"""How much of the file is held in memory: a check reads most of it several times."""

_COUNTS = """
SELECT
    (SELECT count(*) FROM sessions) AS sessions,
    (SELECT count(*) FROM runs) AS runs,
    (SELECT count(*) FROM events) AS events
"""


@dataclass(frozen=True, slots=True)
class Counts:
    """How much a database has."""

    sessions: int
    runs: int
    events: int


@dataclass(frozen=True, slots=True)
class Findings:
    """What is wrong, a line each that begins with the name of the check; how much there is where
    nothing is."""

    problems: tuple[str, ...]
    counts: Counts | None


def check(path: Path) -> Findings:
    """Looks at one snapshot of a file, which a server may use meanwhile. Raises StartError."""
    with snapshot_of(path) as db:
        db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        problems = [*_integrity(db)]
        for name, sql in CHECKS.items():
            problems += _run(db, name, sql)
        return Findings(tuple(problems), None if problems else counts(db))


def counts(db: sqlite3.Connection) -> Counts:
    """How much a database has."""
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
        # Of a damaged file some tables can still be told of.
        yield f"{name}: {error}"
