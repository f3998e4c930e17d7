"""Limits the log lines of refused calls, per caller and in total: a caller can send thousands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import structlog

log = structlog.get_logger()

WINDOW = 60.0
"""Seconds in which the limits count."""

LINES_PER_CALLER = 60
LINES = 1_000
"""Of all callers."""

CALLERS = 1_000
"""Callers that are counted one by one. All further ones of the window count as one caller."""


class LogLimit:
    """Admits log lines up to the limits. `now` is a clock in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._window_start = now()
        self._lines: Counter[str] = Counter()
        self._total = 0
        self._suppressed = 0

    def admits(self, caller: str) -> bool:
        """Returns whether to write a line of this caller, and counts it.

        The first call of a new window logs how many lines the window before has suppressed.
        """
        now = self._now()
        if not 0 <= now - self._window_start < WINDOW:
            self._begin_window(now)
        key = caller if caller in self._lines or len(self._lines) < CALLERS else ""
        if self._total >= LINES or self._lines[key] >= LINES_PER_CALLER:
            self._suppressed += 1
            return False
        self._lines[key] += 1
        self._total += 1
        return True

    def _begin_window(self, now: float) -> None:
        if self._suppressed:
            log.warning(
                "refused calls not logged", count=self._suppressed, callers=len(self._lines)
            )
        self._window_start, self._total, self._suppressed = now, 0, 0
        self._lines.clear()
