"""Compaction of the event log of a SQLite file. Runs in the thread of the write connection.

Compaction removes a prefix, both of a tenant's log and of the events of a run: a reader behind it
gets an error, and never misses events in the middle. The events of a run go before its terminal
event in the log; the last of them stays, as its index is the number of events.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing

from runlane_server.store.base import Position
from runlane_server.store.compaction import largest_log
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
    step.remove_old()
    step.remove_from_large_logs()
    if step.compacted:
        db.execute(SQL["set_compacted"], {"last": max(step.compacted.values())})
    db.execute("COMMIT")
    return CompactionStep(step.events, step.compacted, step.more)


class _Step:
    """The state of one transaction of a compaction."""

    def __init__(self, db: sqlite3.Connection, wanted: Compaction) -> None:
        self.events = 0
        self.compacted: dict[str, Position] = {}
        self.more = False
        self._db = db
        self._wanted = wanted
        self._rows = 0
        self._bytes = 0

    def remove_old(self) -> None:
        """Removes events from the beginning of the log as long as they are old."""
        while not self._is_over:
            row = self._db.execute(SQL["oldest_event"]).fetchone()
            if row is None or _number(row["ended_at"]) >= self._wanted.before:
                return
            self._remove(row)

    def remove_from_large_logs(self) -> None:
        """Cuts the logs that are larger than their share."""
        if self._is_over or self._wanted.keep_bytes is None:
            return
        sizes = {row["position"]: row["size"] for row in self._db.execute(SQL["log_sizes"])}
        largest = largest_log(sizes.values(), self._wanted.keep_bytes)
        for last, size in sizes.items():
            left = size
            while largest is not None and left > largest and not self._is_over:
                row = self._db.execute(SQL["oldest_event_of"], {"last": last}).fetchone()
                if row is None:
                    break
                left -= self._remove(row)

    @property
    def _is_over(self) -> bool:
        return self.more or self.events == self._wanted.limit

    def _remove(self, row: sqlite3.Row) -> int:
        """Removes a terminal event and the events of its run; returns their bytes, or 0 and sets
        `more` at the limit of the transaction."""
        if self._is_full or not self._trim(row):
            self.more = True
            return 0
        log_bytes = _number(row["log_bytes"])
        removed = max(0, log_bytes - _number(row["compacted_bytes"]))
        where = {"position": row["position"]}
        self._db.execute(SQL["set_tenant_compacted"], {**where, "bytes": log_bytes})
        self._trim_lane(row["position"])
        self._db.execute(SQL["delete_event"], where)
        self.compacted[row["tenant"]] = row["position"]
        self.events += 1
        self._rows += 1
        self._bytes += removed
        return removed

    def _trim_lane(self, position: int) -> None:
        """Removes the log of a lane up to the end of the run that ended at a position."""
        end = self._db.execute(SQL["end_in_lane"], {"position": position}).fetchone()
        if end is not None:
            where = {"position": position, "place": end["place"]}
            self._db.execute(SQL["trim_lane_events"], where)
            self._db.execute(SQL["mark_lane_start"], where)

    @property
    def _is_full(self) -> bool:
        return self._rows >= STEP_ROWS or self._bytes >= STEP_BYTES

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
