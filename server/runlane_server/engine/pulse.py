"""When the outboxes of a node begin to write: at once while the event loop has time, together when
it has none.

A write costs the loop about the same for one word as for ten, and so does its event for each
subscriber. Words of a busy node therefore wait a little for others: those of the same run become
one event, and those of all runs share a commit.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextvars import Context

from runlane_server.store.batching import SAMPLE, position_between

MAX_WAIT = 0.030
"""The longest wait in seconds. Nobody who reads along notices it."""

IDLE, BUSY = 0.05, 0.25
"""Busy shares of the event loop. Up to the first nothing waits; from the second the wait is
longest. Both are far below those of the store's writer, for whom callers wait: nobody waits for a
word, and a commit for each one costs more than the rest of its way."""


class Pulse:
    """Calls all functions that wait in one step of the event loop. One per node.

    With `longest` 0 nothing ever waits.
    """

    def __init__(
        self,
        longest: float = MAX_WAIT,
        *,
        clock: Callable[[], float] = time.perf_counter,
        worked: Callable[[], float] = time.thread_time,
    ) -> None:
        self._longest = longest
        self._clock = clock
        self._work = worked
        self._since = clock()
        self._worked = worked()
        self._waiting: list[Callable[[], None]] = []
        self._wait = 0.0

    def call(self, act: Callable[[], None]) -> None:
        """Calls `act` in the next step of the event loop, or up to `longest` seconds later.

        It gets an empty context, not the caller's.
        """
        self._waiting.append(act)
        if len(self._waiting) > 1:
            return
        loop = asyncio.get_running_loop()
        if self._longest:
            self._measure()
        if self._wait:
            loop.call_later(self._wait, self._beat, context=Context())
        else:
            loop.call_soon(self._beat, context=Context())

    def _measure(self) -> None:
        now = self._clock()
        if now - self._since < SAMPLE:
            return
        worked = self._work()
        busy_share = (worked - self._worked) / (now - self._since)
        self._wait = self._longest * position_between(busy_share, IDLE, BUSY)
        self._since, self._worked = now, worked

    def _beat(self) -> None:
        acts, self._waiting = self._waiting, []
        for act in acts:
            act()
