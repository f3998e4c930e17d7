"""How the event log of a SQLite file is compacted. Runs in the thread of the write connection.

What is removed is a prefix, of the log as of the events of a run: whoever reads on behind it is
told, and never finds a hole. A run loses its own events before its terminal event, the last of them
excepted: it says how many there were.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing

from runlane_server.store.base import Position
from runlane_server.store.sqlite.apply import SQL
from runlane_server.store.sqlite.rows import Compaction, Removed

STEP_ROWS = 250
STEP_BYTES = 4 << 20
"""How much is removed in one transaction, as accepts wait for its end: some milliseconds."""


def compact(db: sqlite3.Connection, wanted: Compaction) -> Removed:
    """Removes the oldest events in one transaction, as much as one may have.

    Raises the errors of the database; the outcome is unknown then.
    """
    db.execute("BEGIN IMMEDIATE")
    step = _Step(db, wanted)
    while step.go_on():
        pass
    step.write()
    db.execute("COMMIT")
    return Removed(step.events, step.last, step.more)


class _Step:
    """A transaction that compacts, and how far it is."""

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

    def go_on(self) -> bool:
        """Removes the next terminal event with what goes with it; False where that was the end."""
        if self.events == self._wanted.limit:
            return False
        row = self._db.execute(SQL["oldest_event"], {"after": self.last or 0}).fetchone()
        if row is None or not self._due(row):
            return False
        if not self._full and self._trim(row):
            self.last = row["position"]
            self.events += 1
            self._rows += 1
            # With what the events of its run had.
            self._bytes += row["log_bytes"] - self._removed_to
            self._removed_to = row["log_bytes"]
            return True
        self.more = True
        return False

    def write(self) -> None:
        """Removes the terminal events, and notes where the log begins now."""
        if self.last is not None:
            self._db.execute(SQL["delete_events"], {"last": self.last})
            self._db.execute(SQL["set_compacted"], {"last": self.last})
            self._db.execute(SQL["set_compacted_bytes"], {"bytes": self._removed_to})

    @property
    def _full(self) -> bool:
        return self._rows >= STEP_ROWS or self._bytes >= STEP_BYTES

    def _due(self, row: sqlite3.Row) -> bool:
        keep = self._wanted.keep_bytes
        too_large = keep is not None and self._end - self._removed_to > keep
        return too_large or int(row["ended_at"]) < self._wanted.before

    def _trim(self, row: sqlite3.Row) -> bool:
        """Removes the first events of a run, as far as there is room; returns whether that was all
        but the last."""
        key = {"tenant": row["tenant"], "run_id": row["run_id"]}
        where = {**key, "position": row["position"], "limit": STEP_ROWS + 1}
        last = None
        size = 0
        # Not fetched at once: to know how large a row is means to read it.
        with closing(self._db.execute(SQL["removable_run_events"], where)) as found:
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
