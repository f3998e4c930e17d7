"""Cancels the runs of all sessions of a tenant: at once, or page by page."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from runlane_server.core.errors import CorruptRecord, SessionNotFound
from runlane_server.core.model import SessionKey
from runlane_server.core.transition import Lane, Receipt
from runlane_server.engine.lanes import Lanes
from runlane_server.store.base import Store

PostCancel: TypeAlias = Callable[[SessionKey], "asyncio.Future[Receipt]"]
"""Posts the cancel of a session to its lane."""


@dataclass(frozen=True, slots=True)
class CancelledPage:
    """The receipts of some sessions. `next` is the id of the last one; empty after the last
    page."""

    receipts: tuple[Receipt, ...]
    next: str


class CancelAll:
    """Cancels session by session; each cancel takes effect at an instant of its own (R18)."""

    def __init__(self, lanes: Lanes, store: Store, tenant: str, post: PostCancel) -> None:
        self._lanes = lanes
        self._store = store
        self._tenant = tenant
        self._post = post

    async def at_once(self) -> tuple[Receipt, ...]:
        """Cancels all sessions, at first those that are in memory, which need no read."""
        in_memory = self._in_memory()
        # Gathered before the next await: no reply is left unread if the caller goes away.
        first = self._gather(in_memory)
        others = sorted((await self._stored_loads()).keys() - set(in_memory))
        rest = self._gather(others)
        return _receipts([*in_memory, *others], [*await first, *await rest])

    async def page(self, after: str, max_runs: int) -> CancelledPage:
        """Cancels the sessions whose ids follow `after`, until they have about `max_runs` runs.

        In the order of their ids, so no session is cancelled twice over all pages: a run that is
        accepted after its session was cancelled is spared (R11).
        """
        loads = await self._stored_loads()
        for key in self._in_memory():
            loads[key] = max(loads.get(key, 0), _load(self._lanes.peek(key)))
        later = sorted(key for key in loads if key.session_id > after)
        taken = _take(later, loads, max_runs)
        receipts = _receipts(taken, await self._gather(taken))
        return CancelledPage(receipts, taken[-1].session_id if len(taken) < len(later) else "")

    def _in_memory(self) -> list[SessionKey]:
        return [key for key in self._lanes.keys if key.tenant == self._tenant]

    async def _stored_loads(self) -> dict[SessionKey, int]:
        """The number of open runs of each busy session in the store."""
        return {
            session.key: session.waiting_runs + session.active
            for session in await self._store.busy_sessions()
            if session.key.tenant == self._tenant
        }

    def _gather(self, keys: Iterable[SessionKey]) -> asyncio.Future[list[Receipt | BaseException]]:
        return asyncio.gather(*map(self._post, keys), return_exceptions=True)


def _load(lane: Lane | None) -> int:
    """The number of runs in a lane, if it is known."""
    return 0 if lane is None else len(tuple(lane.runs)) + len(lane.reservations)


def _take(keys: list[SessionKey], loads: dict[SessionKey, int], max_runs: int) -> list[SessionKey]:
    """The first keys, at least one, with together at most `max_runs` runs."""
    runs = 0
    for n, key in enumerate(keys):
        runs += max(1, loads[key])
        if n and runs > max_runs:
            return keys[:n]
    return keys


def _receipts(
    keys: Sequence[SessionKey], replies: Sequence[Receipt | BaseException]
) -> tuple[Receipt, ...]:
    """The receipts with covered runs, and of the sessions that cannot be read, which must not hide
    those of others. Raises the first other failure of a lane that still exists."""
    receipts: list[Receipt] = []
    for key, reply in zip(keys, replies, strict=True):
        if isinstance(reply, CorruptRecord):
            receipts.append(Receipt(key.session_id, unreadable=True))
        elif isinstance(reply, BaseException):
            if not isinstance(reply, SessionNotFound):
                raise reply
        elif reply.cancelled:
            receipts.append(reply)
    return tuple(receipts)
