"""The transaction of a batch of units, from BEGIN to COMMIT, in the thread of the write connection.

Usually it writes all units of a batch table by table. If the database refuses one row, it rolls the
batch back and repeats it unit by unit, so that only the refused unit fails.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from runlane_server.store.base import Position, RunIdTaken, SessionTaken, Stale
from runlane_server.store.sqlfiles import statements
from runlane_server.store.sqlite.rows import Result, Rows, Unit

SQL = statements("sqlite")


class Step(NamedTuple):
    """A statement, and the error for a refused row; None if every outcome is acceptable."""

    name: str
    refusal: Callable[[], Exception] | None


STEPS = (
    # Appends go first: an append in the same batch as the end of its run came before that end.
    Step("append_run_event", Stale.attempt),
    Step("drop_kept_parts", None),
    Step("keep_part", Stale.attempt),
    Step("create_session", SessionTaken),
    Step("insert_session", Stale.lane),
    Step("update_session", Stale.lane),
    Step("edit_session", Stale.lane),
    Step("start_copy", Stale.lane),
    Step("copy_messages", None),
    Step("copy_attachments", None),
    Step("copy_parts", None),
    Step("copy_copied_messages", None),
    Step("copy_copied_attachments", None),
    Step("copy_copied_parts", None),
    Step("hold_source", Stale.lane),
    Step("create_fork", SessionTaken),
    Step("drop_copy", None),
    Step("delete_session", Stale.lane),
    Step("discard_session", None),
    Step("begin_removal", None),
    Step("forget_deleted", None),
    Step("insert_run", RunIdTaken),
    Step("update_run", Stale.run),
    Step("end_run", Stale.run),
    Step("set_retry", Stale.run),
    Step("set_revision", Stale.run),
    Step("edit_run", Stale.run),
    # An edit removes no row of a run that is new in the same transaction: see rows.py.
    Step("delete_prompt", None),
    Step("delete_attachments_of", None),
    Step("insert_prompt", Stale.run),
    Step("insert_attachment", Stale.run),
    Step("insert_message", Stale.run),
    Step("insert_input", Stale.run),
    Step("close_input", Stale.run),
    Step("insert_run_event", Stale.run),
    Step("insert_lane_event", Stale.run),
    Step("insert_event", Stale.run),
    Step("insert_webhook", Stale.webhook),
    Step("reset_webhook", Stale.webhook),
    Step("update_webhook", Stale.webhook),
    Step("save_webhook", Stale.webhook),
    Step("delete_webhook", Stale.webhook),
)


def apply_units(db: sqlite3.Connection, units: Sequence[Unit], position: Position) -> list[Result]:
    """Commits the units; their terminal events get the positions after `position`.

    Returns, for each unit, None or the reason of its refusal. Raises only errors that are fatal
    (see `is_fatal`); the outcome is then unknown.
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
    """Whether an error is one of the database itself and not of a row."""
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
        if unit.inputs:
            unit.rows["insert_input"] = [(position, *row) for row in unit.inputs]
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
    for unit in units:
        if unit.removes is not None:
            unit.removes(db)
