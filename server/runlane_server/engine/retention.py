"""What grows with time is bounded: old terminal events, and sessions nobody writes to any more.

Both are removed in the background, the oldest first, in small steps. Between two steps everybody
else has the writer for several times as long.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
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
"""How many are removed in a step. A session goes whole, however many runs it has."""

SHARE = 4
"""A pause is at least so many times as long as the step before it."""

SHORTEST_PAUSE = 0.05
LONGEST_PAUSE = 60.0
PAUSE_BY_SIZE = 5.0
"""Seconds after which it is looked again whether there is something to remove."""


@dataclass(frozen=True, slots=True)
class Retention:
    """What is kept: events and idle sessions for some seconds, and so many bytes of events.

    None is without limit.
    """

    events: float | None = None
    event_bytes: int | None = None
    sessions: float | None = None


def retention_tasks(
    coordinator: Coordinator, retention: Retention, now: Callable[[], float] = time.time
) -> list[Coroutine[Any, Any, None]]:
    """What is to run in the background, until it is cancelled. `now` is in seconds since 1970."""
    work: list[Coroutine[Any, Any, None]] = []
    if retention.events is not None or retention.event_bytes is not None:
        events = _Events(coordinator, retention, now)
        by_size = PAUSE_BY_SIZE if retention.event_bytes is not None else LONGEST_PAUSE
        work.append(_repeat("event log compacted", events.step, _pause(retention.events, by_size)))
    if retention.sessions is not None:
        sessions = _Sessions(coordinator, retention.sessions, now)
        pause = _pause(retention.sessions, LONGEST_PAUSE)
        work.append(_repeat("old sessions removed", sessions.step, pause))
    return work


def _pause(age: float | None, longest: float) -> float:
    """How long to rest where nothing is left to remove: short, measured by what is kept."""
    return longest if age is None else max(SHORTEST_PAUSE, min(longest, age / 10))


async def _repeat(what: str, step: Callable[[], Awaitable[tuple[int, bool]]], pause: float) -> None:
    """Does a step over and over. It returns how much it removed, and whether there may be more."""
    total = 0
    while True:
        begun = time.monotonic()
        try:
            removed, more = await step()
        except RunlaneError as error:
            log.warning("retention failed", error=error.message)
            removed, more = 0, False
        total += removed
        if total and not more:
            log.info(what, removed=total)
            total = 0
        await asyncio.sleep((time.monotonic() - begun) * SHARE if more else pause)


class _Events:
    """The event log."""

    def __init__(
        self, coordinator: Coordinator, retention: Retention, now: Callable[[], float]
    ) -> None:
        self._store = coordinator.store
        self._retention = retention
        self._now = now

    async def step(self) -> tuple[int, bool]:
        """Removes some events that are too old, or too many."""
        age = self._retention.events
        before = 0 if age is None else _micros(self._now() - age)
        removed = await self._store.compact(
            before, EVENTS_STEP, keep_bytes=self._retention.event_bytes
        )
        return removed, removed == EVENTS_STEP


class _Sessions:
    """Sessions without work."""

    def __init__(self, coordinator: Coordinator, age: float, now: Callable[[], float]) -> None:
        self._coordinator = coordinator
        self._age = age
        self._now = now

    async def step(self) -> tuple[int, bool]:
        """Removes some sessions that nobody has written to for too long."""
        before = _micros(self._now() - self._age)
        stale = await self._coordinator.store.stale_sessions(before, SESSIONS_STEP)
        gone = await asyncio.gather(*(self._remove(session) for session in stale))
        return sum(gone), len(stale) == SESSIONS_STEP and any(gone)

    async def _remove(self, session: IdleSession) -> bool:
        try:
            await self._coordinator.delete_unused(session)
        except (SessionBusy, SessionNotFound):
            return False
        return True


def _micros(seconds: float) -> Micros:
    return int(seconds * 1_000_000)
