"""Compaction of the event log of a SQLite file. Runs in the thread of the write connection.

Compaction removes a prefix, both of the log and of the events of a run: a reader behind it gets an
error, and never misses events in the middle. The events of a run go before its terminal event in
the log; the last of them stays, as its index is the number of events.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing

from runlane_server.store.base import Position
from runlane_server.store.sqlite.rows import Compaction, CompactionStep
from runlane_server.store.sqlite.transaction import SQL

STEP_ROWS = 250
STEP_BYTES = 4 << 20
"""The most that one transaction removes. Accepts wait for its end: some milliseconds."""


def compact(db: sqlite3.Connection, wanted: Compaction) -> CompactionStep:
    """Removes the oldest events, up to the limit of one transaction.

    Raises the errors of the database; the outcome is then unknown.
    """
    db.execute("BEGIN IMMEDIATE")
    step = _Step(db, wanted)
    while step.remove_next():
        pass
    step.write()
    db.execute("COMMIT")
    return CompactionStep(step.events, step.last, step.more)


class _Step:
    """The state of one transaction of a compaction."""

    def __init__(self, db: sqlite3.Connection, wanted: Compaction) -> None:
        self.events = 0
        self.last: Position | None = None
        self.more = False
        self._db = db
        self._wanted = wanted
        self._start: int = db.execute(SQL["compacted_bytes"]).fetchone()[0]
        self._removed_to = self._start
        self._end = self._start + int(db.execute(SQL["log_bytes"]).fetchone()[0])
        self._rows = 0
        self._bytes = 0

    def remove_next(self) -> bool:
        """Removes the next terminal event and the events of its run; returns False at the end."""
        if self.events == self._wanted.limit:
            return False
        row = self._db.execute(SQL["oldest_event"], {"after": self.last or 0}).fetchone()
        if row is None or not self._is_due(row):
            return False
        if not self._is_full and self._trim(row):
            self.last = row["position"]
            self.events += 1
            self._rows += 1
            # This includes the bytes of the events of its run.
            log_bytes = max(self._removed_to, _number(row["log_bytes"]))
            self._bytes += log_bytes - self._removed_to
            self._removed_to = log_bytes
            return True
        self.more = True
        return False

    def write(self) -> None:
        """Removes the terminal events, and stores where the log now begins."""
        if self.last is not None:
            self._db.execute(SQL["delete_events"], {"last": self.last})
            self._db.execute(SQL["set_compacted"], {"last": self.last})
            self._db.execute(SQL["set_compacted_bytes"], {"bytes": self._removed_to})

    @property
    def _is_full(self) -> bool:
        return self._rows >= STEP_ROWS or self._bytes >= STEP_BYTES

    def _is_due(self, row: sqlite3.Row) -> bool:
        keep = self._wanted.keep_bytes
        too_large = keep is not None and self._end - self._removed_to > keep
        return too_large or _number(row["ended_at"]) < self._wanted.before

    def _trim(self, row: sqlite3.Row) -> bool:
        """Removes the first events of a run, up to the limit of the transaction; returns whether
        only its last event is left."""
        key = {"tenant": row["tenant"], "run_id": row["run_id"]}
        where = {**key, "position": row["position"], "limit": STEP_ROWS + 1}
        last = None
        size = 0
        # Row by row: the size of a row is known only after it was read.
        try:
            events = self._db.execute(SQL["removable_run_events"], where)
        except UnicodeEncodeError:
            return True  # a damaged row, whose run has no readable id
        with closing(events) as found:
            for event in found:
                if self._rows >= STEP_ROWS or self._bytes + size >= STEP_BYTES:
                    complete = False
                    break
                last = event["idx"]
                size += event["bytes"]
                self._rows += 1
            else:
                complete = True
        if last is not None:
            self._db.execute(SQL["delete_first_run_events"], {**key, "last": last})
        return complete


def _number(value: object) -> int:
    """A stored number; 0 for a damaged one, so that its event is removed as an old one."""
    return value if type(value) is int and 0 <= value < 1 << 62 else 0
