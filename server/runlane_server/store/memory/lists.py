"""The filtered lists of the store in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from runlane_server.core.model import Run, Session
from runlane_server.store.base import Page
from runlane_server.store.lookup import ListPlace, RunFilter, SessionFilter
from runlane_server.store.memory.tables import Tables

Item = TypeVar("Item")


def list_runs(
    tables: Tables, tenant: str, wanted: RunFilter, after: ListPlace | None, limit: int
) -> Page[Run, ListPlace]:
    """A page of runs, without the texts of their RunCompletes."""
    found = matching_runs(tables, tenant, wanted)
    return _page(found, after, limit, descending=wanted.order.is_descending)


def list_sessions(
    tables: Tables, tenant: str, wanted: SessionFilter, after: ListPlace | None, limit: int
) -> Page[Session, ListPlace]:
    """A page of sessions."""
    found = matching_sessions(tables, tenant, wanted)
    return _page(found, after, limit, descending=wanted.is_descending)


def matching_runs(
    tables: Tables, tenant: str, wanted: RunFilter
) -> Sequence[tuple[ListPlace, Run]]:
    """The runs of a list, in no order."""
    return [
        (_place_of(row.number, row.run, wanted), row.shown.without_text)
        for key, row in tables.runs.items()
        if key.tenant == tenant
        and wanted.matches(row.run)
        and not tables.is_removed(tenant, row.run.session_id)
    ]


def _place_of(number: int, run: Run, wanted: RunFilter) -> ListPlace:
    if wanted.order.by_end:
        return run.ended_at or 0, number
    by_time = wanted.accepted.is_bounded and wanted.session_id is None and not wanted.labels
    return (run.accepted_at if by_time else 0), number


def matching_sessions(
    tables: Tables, tenant: str, wanted: SessionFilter
) -> Sequence[tuple[ListPlace, Session]]:
    """The sessions of a list, in no order."""
    by_time = wanted.created.is_bounded and not wanted.labels and not wanted.busy
    return [
        ((row.session.created_at if by_time else 0, row.number), row.session)
        for key, row in tables.sessions.items()
        if key.tenant == tenant and wanted.matches(row.session)
    ]


def _page(
    found: Sequence[tuple[ListPlace, Item]],
    after: ListPlace | None,
    limit: int,
    *,
    descending: bool,
) -> Page[Item, ListPlace]:
    left = [
        one
        for one in sorted(found, key=lambda one: one[0], reverse=descending)
        if after is None or (one[0] < after if descending else one[0] > after)
    ]
    place = left[limit - 1][0] if len(left) > limit else None
    return Page(tuple([item for _, item in left[:limit]]), place)
