"""The filtered lists of a PostgreSQL database."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from runlane_server.core.model import Run, Session
from runlane_server.store.base import Page
from runlane_server.store.codec import encode_metadata
from runlane_server.store.lookup import Count, ListPlace, RunFilter, SessionFilter
from runlane_server.store.lookup_sql import Dialect, Lookup, Statement, count_from, runs, sessions
from runlane_server.store.paging import list_page, without_removed
from runlane_server.store.postgres.pool import Pool
from runlane_server.store.postgres.text import escape, unescape
from runlane_server.store.records import run_from, session_from

Item = TypeVar("Item")


def _label(add: Callable[[object], str], key: str, value: str) -> str:
    encoded = encode_metadata({key: value}) or ""
    return f"label = md5({add(encoded[1:-1])})::uuid"


def _any_of(add: Callable[[object], str], column: str, values: Sequence[str]) -> str:
    return f"{column} = ANY ({add(values)}::text[])"


DIALECT = Dialect("$", by_number=False, escape=escape, label=_label, any_of=_any_of)


async def list_runs(
    pool: Pool, tenant: str, wanted: RunFilter, after: ListPlace | None, limit: int
) -> Page[Run, ListPlace]:
    """A page of runs."""
    lookup = runs(DIALECT, tenant, wanted)
    page = await _page(pool, lookup, after, limit, lambda row: row)
    return without_removed(page, lambda row: run_from(tenant, row, unescape))


async def count_runs(pool: Pool, tenant: str, wanted: RunFilter) -> Count:
    """The number of runs in a list."""
    return await _count(pool, runs(DIALECT, tenant, wanted))


async def list_sessions(
    pool: Pool, tenant: str, wanted: SessionFilter, after: ListPlace | None, limit: int
) -> Page[Session, ListPlace]:
    """A page of sessions."""
    lookup = sessions(DIALECT, tenant, wanted)
    return await _page(pool, lookup, after, limit, lambda row: session_from(tenant, row, unescape))


async def count_sessions(pool: Pool, tenant: str, wanted: SessionFilter) -> Count:
    """The number of sessions in a list."""
    return await _count(pool, sessions(DIALECT, tenant, wanted))


async def _page(
    pool: Pool,
    lookup: Lookup,
    after: ListPlace | None,
    limit: int,
    item: Callable[[Mapping[str, Any]], Item],
) -> Page[Item, ListPlace]:
    statement = lookup.page(after, limit)
    found = await _fetch(pool, statement)
    stopped = None
    if len(found) <= limit and statement.drops:
        stopped = next(iter(await _fetch(pool, lookup.last_read(after))), None)
    return list_page(found, limit, item, stopped)


async def _count(pool: Pool, lookup: Lookup) -> Count:
    (row,) = await _fetch(pool, lookup.count())
    return count_from(row)


async def _fetch(pool: Pool, statement: Statement) -> Sequence[Mapping[str, Any]]:
    rows: Sequence[Mapping[str, Any]] = await pool.fetch(
        statement.sql, *statement.args, tenant=str(statement.args[0])
    )
    return rows
