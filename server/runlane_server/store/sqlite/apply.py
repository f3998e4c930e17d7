"""How units become a transaction. Runs in the thread of the write connection; has no state.

The happy path writes all units of a batch table by table. If a single row of it is refused, the
batch is rolled back and done again unit by unit, so that a refused unit fails alone.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from runlane_server.store.base import Position, RunIdTaken, SessionTaken, Stale
from runlane_server.store.sqlfiles import statements
from runlane_server.store.sqlite.rows import Result, Rows, Unit

SQL = statements("sqlite")


class Step(NamedTuple):
    """A statement, and what it means if a row of it is refused; None if any outcome is right."""

    name: str
    refusal: Callable[[], Exception] | None


_STALE = partial(Stale, "the lane is not at the version that the transition was made from")
_FENCED = partial(Stale, "the attempt is not the active one")
_OUT_OF_STEP = partial(Stale, "the run, or its events, are not what the transition was made from")

STEPS = (
    # Appends go first: one that shares a batch with the commit that ends its run came before it.
    Step("append_run_event", _FENCED),
    Step("create_session", partial(SessionTaken, "a session of that id exists already")),
    Step("insert_session", _STALE),
    Step("update_session", _STALE),
    Step("delete_session", _STALE),
    Step("delete_messages", None),
    Step("delete_run_events", None),
    Step("delete_attachments", None),
    Step("delete_prompts", None),
    Step("delete_runs", None),
    Step("insert_run", partial(RunIdTaken, "a run of that id exists already")),
    Step("update_run", _OUT_OF_STEP),
    Step("end_run", _OUT_OF_STEP),
    Step("insert_prompt", _OUT_OF_STEP),
    Step("insert_attachment", _OUT_OF_STEP),
    Step("insert_message", _OUT_OF_STEP),
    Step("insert_run_event", _OUT_OF_STEP),
    Step("insert_event", _OUT_OF_STEP),
)


def apply(db: sqlite3.Connection, units: Sequence[Unit], position: Position) -> list[Result]:
    """Commits the units; their terminal events get the positions after `position`.

    Returns, for each unit, None or why it alone was refused. Raises what `is_fatal` tells of; the
    outcome is unknown then.
    """
    db.execute("BEGIN IMMEDIATE")
    try:
        _number(units, position)
        _write(db, units)
    except Exception as error:
        if is_fatal(error):
            raise
        db.execute("ROLLBACK")
        return [error] if len(units) == 1 else _apply_singly(db, units, position)
    db.execute("COMMIT")
    return [None] * len(units)


def is_fatal(error: BaseException) -> bool:
    """Whether an error is the database's and not that of the row it was given."""
    if isinstance(error, sqlite3.Error):
        return not isinstance(
            error,
            sqlite3.IntegrityError
            | sqlite3.DataError
            | sqlite3.ProgrammingError
            | sqlite3.InterfaceError,
        )
    return not isinstance(error, Exception) or isinstance(error, MemoryError)


def _apply_singly(
    db: sqlite3.Connection, units: Sequence[Unit], position: Position
) -> list[Result]:
    results: list[Result] = []
    db.execute("BEGIN IMMEDIATE")
    for unit in units:
        db.execute("SAVEPOINT unit")
        try:
            _number([unit], position)
            _write(db, [unit])
        except Exception as error:
            if is_fatal(error):
                raise
            db.execute("ROLLBACK TO unit")
            results.append(error)
        else:
            position += len(unit.completes)
            results.append(None)
        db.execute("RELEASE unit")
    db.execute("COMMIT")
    return results


def _number(units: Sequence[Unit], position: Position) -> None:
    for unit in units:
        unit.first_position = position + 1
        if unit.logged:
            unit.rows["insert_event"] = [
                (number, *row) for number, row in enumerate(unit.logged, position + 1)
            ]
            position += len(unit.logged)


def _write(db: sqlite3.Connection, units: Sequence[Unit]) -> None:
    tables: Rows = defaultdict(list)
    for unit in units:
        for name, rows in unit.rows.items():
            tables[name] += rows
    for name, refusal in STEPS:
        if name not in tables:
            continue
        rows = tables[name]
        try:
            count = db.executemany(SQL[name], rows).rowcount
        except sqlite3.IntegrityError as error:
            if refusal is None:
                raise
            raise refusal() from error
        if refusal is not None and count != len(rows):
            raise refusal()
