"""The timers of lanes whose first run waits for its next attempt (R38)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from runlane_server.core.model import Micros, SessionKey
from runlane_server.core.transition import Lane


class Backoffs:
    """One timer per lane, which queues the lane for a slot when its run may start."""

    def __init__(self, now: Callable[[], Micros], enqueue: Callable[[SessionKey], None]) -> None:
        self._now = now
        self._enqueue = enqueue
        self._timers: dict[SessionKey, asyncio.TimerHandle] = {}

    @property
    def lanes(self) -> Collection[SessionKey]:
        """The lanes with a timer."""
        return self._timers.keys()

    def follow(self, lane: Lane, *, is_due: bool) -> None:
        """Sets or removes the timer of a lane that was committed.

        `is_due`: its next run could start, and only a slot or its agent is missing; without a timer
        the lane would be queued again and again. A run that became due during the commit is queued
        at once.
        """
        timer = self._timers.pop(lane.key, None)
        if timer is not None:
            timer.cancel()
        run = lane.backing_off
        if run is None or is_due:
            return
        seconds = max(0, run.not_before - self._now()) / 1e6
        loop = asyncio.get_running_loop()
        self._timers[lane.key] = loop.call_later(seconds, self._on_due, lane.key)

    def _on_due(self, key: SessionKey) -> None:
        del self._timers[key]
        self._enqueue(key)
