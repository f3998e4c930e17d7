"""Removes what belonged to deleted sessions, and dropped copies, piece by piece.

The commit that deletes a session lists it in `removals` and removes the first piece, which is all
of a small session. Other commits remove the rest; a crash loses none of them. Runs in the thread of
the write connection, within the transaction of a batch.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Sequence
from contextlib import closing

from runlane_server.store.sqlfiles import statements

PIECE_RUNS = 200
PIECE_ROWS = 1_000
"""The most runs, and the most rows of any table, that a piece removes: some milliseconds."""

PIECE_CHARACTERS = 4 << 20
"""Characters of messages, and of prompts, at which a piece ends."""

PIECE_BLOBS = 20
"""The most attachments, or parts of long messages, that a piece removes."""

SQL = statements("sqlite")

NO_LIMIT = -1


def remove_next(db: sqlite3.Connection) -> None:
    """Removes a piece of the oldest removal, or of a dropped copy; does nothing without one."""
    removal = db.execute(SQL["oldest_removal"]).fetchone()
    if removal is not None:
        _remove_piece(db, removal[0])
        return
    copy = db.execute(SQL["oldest_dropped_copy"]).fetchone()
    if copy is not None:
        _remove_copy(db, copy[0])


def remove_first(db: sqlite3.Connection, key: Sequence[str], *, has_open_runs: bool) -> None:
    """Removes the first piece of a session that is deleted in this transaction.

    `has_open_runs`: it may have open runs, which do not outlast this transaction.
    """
    removal = db.execute(SQL["removal_of"], tuple(key)).fetchone()[0]
    if has_open_runs:
        _remove_runs(db, db.execute(SQL["open_runs_of_removal"], (removal,)), NO_LIMIT, NO_LIMIT)
    _remove_piece(db, removal)


def remove_copy(db: sqlite3.Connection, copy_id: int) -> None:
    """Removes the first piece of a copy, if it was dropped."""
    if db.execute(SQL["is_dropped"], (copy_id,)).fetchone() is not None:
        _remove_copy(db, copy_id)


def _remove_piece(db: sqlite3.Connection, removal: int) -> None:
    # Runs go last: they have the other rows of theirs.
    if _remove_messages(db, removal):
        return
    for name in ("remove_lane_events", "remove_inputs"):
        if _is_cut(db, name, (removal, PIECE_ROWS), PIECE_ROWS):
            return
    with closing(db.execute(SQL["runs_of_removal"], (removal, PIECE_RUNS))) as rows:
        found = _with_few_attachments(_first(rows))
    if not _remove_runs(db, found, PIECE_ROWS, PIECE_BLOBS):
        return
    if db.execute(SQL["runs_of_removal"], (removal, 1)).fetchone() is None:
        db.execute(SQL["end_removal"], (removal,))


def _remove_messages(db: sqlite3.Connection, removal: int) -> bool:
    """Removes messages; returns whether there may be more."""
    with closing(db.execute(SQL["messages_of_removal"], (removal, PIECE_ROWS))) as rows:
        found = _first(rows)
        is_cut = len(found) == PIECE_ROWS or rows.fetchone() is not None
    db.execute(SQL["remove_messages"], (json.dumps([row["rowid"] for row in found]),))
    return is_cut


def _first(rows: Iterable[sqlite3.Row]) -> Sequence[sqlite3.Row]:
    """The first rows, up to the characters of a piece. The others are not read: the size of a row
    is known only after it was."""
    found = []
    characters = 0
    for row in rows:
        found.append(row)
        characters += row["size"] if type(row["size"]) is int else 0
        if characters >= PIECE_CHARACTERS:
            break
    return found


def _with_few_attachments(found: Sequence[sqlite3.Row]) -> Sequence[sqlite3.Row]:
    """The first runs, with the attachments of a piece. They go together with their runs."""
    attachments = 0
    for n, row in enumerate(found):
        attachments += row["attachments"] if type(row["attachments"]) is int else 0
        if n and attachments > PIECE_BLOBS:
            return found[:n]
    return found


def _remove_runs(
    db: sqlite3.Connection, found: Iterable[sqlite3.Row], rows: int, blobs: int
) -> bool:
    """Removes runs with all that belongs to them; returns whether they are gone."""
    runs = json.dumps([row["run_no"] for row in found])
    # The last event stays until the run goes: its index is what is remembered of them.
    for name, limit in (("remove_run_events", rows), ("remove_kept_parts", blobs)):
        if _is_cut(db, name, (runs, limit), limit):
            return False
    db.execute(SQL["remember_runs"], (time.time_ns() // 1_000, runs))
    for name in ("remove_last_events", "remove_attachments", "remove_prompts", "remove_runs"):
        db.execute(SQL[name], (runs,))
    return True


def _remove_copy(db: sqlite3.Connection, copy_id: int) -> None:
    for name, limit in (
        ("remove_copied_attachments", PIECE_BLOBS),
        ("remove_copied_parts", PIECE_BLOBS),
        ("remove_copied_messages", PIECE_ROWS),
    ):
        if _is_cut(db, name, (copy_id, limit), limit):
            return
    db.execute(SQL["end_dropped_copy"], (copy_id,))


def _is_cut(db: sqlite3.Connection, name: str, values: tuple[object, ...], limit: int) -> bool:
    """Removes rows; returns whether it stopped at the limit."""
    return db.execute(SQL[name], values).rowcount == limit
