"""Removes old terminal events and unused sessions, so that the store does not grow without bound.

Both are removed in the background, oldest first, in small steps. Between two steps the writer is
free for others for several times as long as a step takes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import structlog

from runlane_server.core.errors import RunlaneError, SessionBusy, SessionNotFound
from runlane_server.core.model import Micros
from runlane_server.engine.coordinator import Coordinator
from runlane_server.store.base import IdleSession

log = structlog.get_logger()

EVENTS_STEP = 100
SESSIONS_STEP = 20
"""Number of items removed in a step. A session is removed with all its runs."""

DELETED_KEPT = 30 * 86_400.0
"""Seconds for which a run id cannot be used again after its session was deleted (R3)."""

DELETED_STEP = 1_000
"""Number of deleted runs forgotten in a step."""

PAUSE_FACTOR = 4
"""Minimum length of a pause, in lengths of the step before it."""

SHORTEST_PAUSE = 0.05
LONGEST_PAUSE = 60.0
PAUSE_BY_SIZE = 5.0
REMOVAL_PAUSE = 5.0
"""Seconds between two checks for something to remove."""


@dataclass(frozen=True, slots=True)
class Retention:
    """The maximum age of events and of idle sessions, in seconds, and the size of the event log, in
    bytes. None means no limit.
    """

    events: float | None = None
    event_bytes: int | None = None
    sessions: float | None = None


def retention_tasks(
    coordinator: Coordinator, retention: Retention, now: Callable[[], float] = time.time
) -> list[Coroutine[Any, Any, None]]:
    """The coroutines to run in the background until they are cancelled.

    `now` returns seconds since 1970.
    """
    work = [
        _repeat("deleted runs forgotten", _DeletedRuns(coordinator, now).step, LONGEST_PAUSE),
        _repeat(
            "deleted sessions removed",
            _Removals(coordinator).step,
            REMOVAL_PAUSE,
            wake=coordinator.sessions.deleted,
        ),
    ]
    if retention.events is not None or retention.event_bytes is not None:
        events = _EventCleaner(coordinator, retention, now)
        by_size = PAUSE_BY_SIZE if retention.event_bytes is not None else LONGEST_PAUSE
        work.append(_repeat("event log compacted", events.step, _pause(retention.events, by_size)))
    if retention.sessions is not None:
        sessions = _SessionCleaner(coordinator, retention.sessions, now)
        pause = _pause(retention.sessions, LONGEST_PAUSE)
        work.append(_repeat("old sessions removed", sessions.step, pause))
    return work


def _pause(age: float | None, longest: float) -> float:
    """Seconds between checks if nothing is left to remove: short compared to the retention time."""
    return longest if age is None else max(SHORTEST_PAUSE, min(longest, age / 10))


async def _repeat(
    log_event: str,
    step: Callable[[], Awaitable[tuple[int, bool]]],
    pause: float,
    *,
    wake: asyncio.Event | None = None,
) -> None:
    """Repeats a step, which returns the number of items removed and whether there may be more.

    `wake` ends a pause early.
    """
    total = 0
    wake = wake or asyncio.Event()
    while True:
        wake.clear()
        begun = time.monotonic()
        try:
            removed, more = await step()
        except RunlaneError as error:
            log.warning("retention failed", error=error.message)
            removed, more = 0, False
        total += removed
        if total and not more:
            log.info(log_event, removed=total)
            total = 0
        if more:
            await asyncio.sleep((time.monotonic() - begun) * PAUSE_FACTOR)
            continue
        with suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await wake.wait()


class _EventCleaner:
    """Removes terminal events that are too old or too many."""

    def __init__(
        self, coordinator: Coordinator, retention: Retention, now: Callable[[], float]
    ) -> None:
        self._store = coordinator.store
        self._retention = retention
        self._now = now

    async def step(self) -> tuple[int, bool]:
        """Removes one batch of events."""
        age = self._retention.events
        before = 0 if age is None else _micros(self._now() - age)
        removed = await self._store.compact(
            before, EVENTS_STEP, keep_bytes=self._retention.event_bytes
        )
        return removed, removed == EVENTS_STEP


class _DeletedRuns:
    """Forgets runs whose session was deleted long ago."""

    def __init__(self, coordinator: Coordinator, now: Callable[[], float]) -> None:
        self._store = coordinator.store
        self._now = now

    async def step(self) -> tuple[int, bool]:
        """Forgets one batch of runs."""
        before = _micros(self._now() - DELETED_KEPT)
        forgotten = await self._store.forget_deleted(before, DELETED_STEP)
        return forgotten, forgotten == DELETED_STEP


class _Removals:
    """Removes what belonged to deleted sessions."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._store = coordinator.store

    async def step(self) -> tuple[int, bool]:
        """Removes a piece; it counts nothing, as most sessions go without one."""
        return 0, await self._store.remove_deleted()


class _SessionCleaner:
    """Deletes sessions that have been idle for too long."""

    def __init__(self, coordinator: Coordinator, age: float, now: Callable[[], float]) -> None:
        self._coordinator = coordinator
        self._age = age
        self._now = now

    async def step(self) -> tuple[int, bool]:
        """Deletes one batch of sessions."""
        before = _micros(self._now() - self._age)
        stale = await self._coordinator.store.stale_sessions(before, SESSIONS_STEP)
        gone = await asyncio.gather(*(self._remove(session) for session in stale))
        return sum(gone), len(stale) == SESSIONS_STEP and any(gone)

    async def _remove(self, session: IdleSession) -> bool:
        try:
            await self._coordinator.sessions.delete_unused(session)
        except (SessionBusy, SessionNotFound):
            return False
        return True


def _micros(seconds: float) -> Micros:
    return int(seconds * 1_000_000)
