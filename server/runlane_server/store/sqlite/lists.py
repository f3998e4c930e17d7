# ruff: noqa: S608 - every value is an argument
"""The filtered lists of a SQLite file, as functions on a connection."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from typing import TypeVar

from runlane_server.core.model import Run, Session
from runlane_server.store.base import Page
from runlane_server.store.codec import encode_metadata
from runlane_server.store.lookup import Count, ListPlace, RunFilter, SessionFilter
from runlane_server.store.lookup_sql import Dialect, Lookup, Statement, count_from, runs, sessions
from runlane_server.store.paging import list_page, without_removed
from runlane_server.store.records import run_from, session_from
from runlane_server.store.sqlite.connection import as_is

Item = TypeVar("Item")


def _label(add: Callable[[object], str], key: str, value: str) -> str:
    # As the triggers of `0014_lookup.sql` store it.
    encoded = (encode_metadata({key: value}) or "").replace("\\u0000", "\\ue000")
    ((key, value),) = json.loads(encoded).items()
    return f"key = {add(key)} AND value = {add(value)}"


def _any_of(add: Callable[[object], str], column: str, values: Sequence[str]) -> str:
    return f"{column} IN (SELECT value FROM json_each({add(json.dumps(values))}))"


DIALECT = Dialect(":p", by_number=True, escape=as_is, label=_label, any_of=_any_of)


def list_runs(
    db: sqlite3.Connection, tenant: str, wanted: RunFilter, after: ListPlace | None, limit: int
) -> Page[Run, ListPlace]:
    """A page of runs."""
    lookup = runs(DIALECT, tenant, wanted)
    page = _page(db, lookup, after, limit, lambda row: row)
    return without_removed(page, lambda row: run_from(tenant, row, as_is))


def count_runs(db: sqlite3.Connection, tenant: str, wanted: RunFilter) -> Count:
    """The number of runs in a list."""
    return _count(db, runs(DIALECT, tenant, wanted))


def list_sessions(
    db: sqlite3.Connection, tenant: str, wanted: SessionFilter, after: ListPlace | None, limit: int
) -> Page[Session, ListPlace]:
    """A page of sessions."""
    lookup = sessions(DIALECT, tenant, wanted)
    return _page(db, lookup, after, limit, lambda row: session_from(tenant, row, as_is))


def count_sessions(db: sqlite3.Connection, tenant: str, wanted: SessionFilter) -> Count:
    """The number of sessions in a list."""
    return _count(db, sessions(DIALECT, tenant, wanted))


def _page(
    db: sqlite3.Connection,
    lookup: Lookup,
    after: ListPlace | None,
    limit: int,
    item: Callable[[sqlite3.Row], Item],
) -> Page[Item, ListPlace]:
    statement = lookup.page(after, limit)
    found = _execute(db, statement)
    stopped = None
    if len(found) <= limit and statement.drops:
        stopped = next(iter(_execute(db, lookup.last_read(after))), None)
    return list_page(found, limit, item, stopped)


def _count(db: sqlite3.Connection, lookup: Lookup) -> Count:
    (row,) = _execute(db, lookup.count())
    return count_from(row)


def _execute(db: sqlite3.Connection, statement: Statement) -> list[sqlite3.Row]:
    arguments = {f"p{n}": value for n, value in enumerate(statement.args, start=1)}
    return db.execute(statement.sql, arguments).fetchall()
