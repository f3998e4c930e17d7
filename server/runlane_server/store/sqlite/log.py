"""The reads of the event log of a SQLite file. They run in the reader's thread."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any

from runlane_server.core.model import RunKey
from runlane_server.store.base import EventFilter, LoggedComplete, Position
from runlane_server.store.paging import complete_size, take_page
from runlane_server.store.records import logged_from
from runlane_server.store.sqlite.connection import as_is
from runlane_server.store.sqlite.transaction import SQL


def log_bytes(db: sqlite3.Connection) -> int:
    """The approximate size of the event log in bytes, with the events of its runs."""
    value: int = db.execute(SQL["log_bytes"]).fetchone()[0]
    return value


def position_of(db: sqlite3.Connection, key: RunKey) -> Position | None:
    """The position of a run's terminal event."""
    row = db.execute(SQL["position_of_run"], key._asdict()).fetchone()
    return None if row is None else int(row["position"])


def log_page(
    db: sqlite3.Connection,
    tenant: str,
    wanted: EventFilter,
    *,
    after: Position,
    known: Position,
    limit: int,
    max_bytes: int,
) -> tuple[list[LoggedComplete], bool, Position]:
    """Terminal events after a position and up to `known`; whether there are more; and the position
    up to which the log was compacted at the time of the read."""
    where = {"tenant": tenant, "after": after, "known": known, "limit": limit + 1}
    events = (logged_from(row, as_is) for row in _logged(db, wanted, where))
    page, more = take_page(events, limit=limit, max_bytes=max_bytes, size=complete_size)
    return page, more, db.execute(SQL["compacted"]).fetchone()["value"]


def _logged(
    db: sqlite3.Connection, wanted: EventFilter, where: dict[str, Any]
) -> Iterator[sqlite3.Row]:
    if wanted.matches_all:
        yield from db.execute(SQL["events"], where)
        return
    # One seek for each id reads no more rows than a page can hold, however long the log is.
    positions: set[int] = set()
    for name, ids in (
        ("positions_of_session", wanted.session_ids),
        ("positions_of_run", wanted.run_ids),
    ):
        for id_ in ids:
            positions.update(row[0] for row in db.execute(SQL[name], where | {"id": id_}))
    for position in sorted(positions):
        yield db.execute(SQL["event"], {"position": position}).fetchone()
