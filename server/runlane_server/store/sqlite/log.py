"""The reads of the event log of a SQLite file. They run in the reader's thread."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Any

from runlane_server.core.model import RunKey
from runlane_server.store.base import EventFilter, LoggedComplete, Position
from runlane_server.store.paging import complete_size, take_page
from runlane_server.store.records import logged_from
from runlane_server.store.sqlite.connection import as_is
from runlane_server.store.sqlite.transaction import SQL


def log_bytes(db: sqlite3.Connection) -> int:
    """The approximate size of the event log in bytes, with the events of its runs."""
    return sum(row["size"] for row in db.execute(SQL["log_sizes"]))


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
    up to which the tenant's log was compacted at the time of the read."""
    where = {"tenant": tenant, "after": after, "known": known, "limit": limit + 1}
    events = (logged_from(row, as_is) for row in _logged(db, wanted, where))
    page, more = take_page(events, limit=limit, max_bytes=max_bytes, size=complete_size)
    compacted = db.execute(SQL["compacted_of"], {"tenant": tenant}).fetchone()["value"]
    return page, more, compacted


def _logged(
    db: sqlite3.Connection, wanted: EventFilter, where: dict[str, Any]
) -> Iterator[sqlite3.Row]:
    if wanted.matches_all:
        yield from db.execute(SQL["events"], where)
        return
    for position in _positions(db, wanted, where):
        yield db.execute(SQL["event"], {"position": position}).fetchone()


def _positions(
    db: sqlite3.Connection, wanted: EventFilter, where: dict[str, Any]
) -> Iterator[Position]:
    """Yields the positions of the wanted events, in order.

    It seeks once for each id and once for each position that it yields, however long the log is and
    however many events the ids have.
    """

    def seek(name: str, id_: str, after: Position) -> Iterator[tuple[Position, str, str]]:
        given = where | {"id": id_, "after": after, "limit": 1}
        for row in db.execute(SQL[name], given):
            yield row["position"], name, id_

    names = {"positions_of_session": wanted.session_ids, "positions_of_run": wanted.run_ids}
    heads = [
        head
        for name, ids in names.items()
        for id_ in ids
        for head in seek(name, id_, where["after"])
    ]
    heapify(heads)
    last = None
    while heads:
        position, name, id_ = heappop(heads)
        if position != last:
            yield position
        last = position
        for head in seek(name, id_, position):
            heappush(heads, head)
