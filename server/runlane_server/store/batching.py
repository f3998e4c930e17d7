"""How long a writer or a reader waits for company before it begins.

A commit costs the event loop about the same whether one unit shares it or fifty: hops between
threads, statements, and what the kernel does for a synced write. So it is with a hop of the reader.
While the loop has time to spare nobody is kept waiting. When it has none, what comes in is spread
over many small ones unless they hold back a little; the callers, who stand in line for the loop
anyway, are served sooner.
"""

from __future__ import annotations

import time
from collections.abc import Callable

MAX_PAUSE = 0.020
"""Seconds that a writer waits at the most, and a reader a quarter of it."""

SAMPLE = 0.05
"""Seconds over which the share of its time is taken that the loop is at work."""

IDLE, BUSY = 0.40, 0.75
"""Below the one share nobody waits, from the other on it is as long as may be."""

ALONE, MANY = 1.25, 4.0
"""The same for the units that lately went together: where nobody comes nobody is waited for."""

MEMORY, FORGETTING = 8, 2
"""Over how many times the number of units is smoothed while it grows, and while it shrinks: whoever
comes alone after a rush is not to wait for what is over."""

SILENCE = 0.25
"""Seconds without any after which all that was learned is of another time."""


class Pace:
    """Belongs to the writer, or the reader, of one event loop, and is used on its thread only."""

    def __init__(
        self,
        longest: float = MAX_PAUSE,
        *,
        clock: Callable[[], float] = time.perf_counter,
        worked: Callable[[], float] = time.thread_time,
    ) -> None:
        self._longest = longest
        self._clock = clock
        self._work = worked
        self._since = self._last = clock()
        self._worked = worked()
        self._share = 0.0
        self._company = 1.0

    def pause(self) -> float:
        """Seconds to wait before the next one; 0 unless that pays."""
        if self._clock() - self._last > SILENCE:
            self._company = 1.0
        company = _between(self._company, ALONE, MANY)
        return self._longest * company * _between(self._share, IDLE, BUSY) if company else 0.0

    def went(self, units: int) -> None:
        """Learns that so many units went together."""
        self._company += (units - self._company) / (MEMORY if units > self._company else FORGETTING)
        now = self._last = self._clock()
        if now - self._since >= SAMPLE:
            worked = self._work()
            self._share = (worked - self._worked) / (now - self._since)
            self._since, self._worked = now, worked


def _between(value: float, low: float, high: float) -> float:
    """Where a value lies between two others: from 0 to 1."""
    return min(1.0, max(0.0, (value - low) / (high - low)))
