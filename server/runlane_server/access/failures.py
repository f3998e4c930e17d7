"""The log of those who were not let in: bounded, whatever they do."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from runlane_server.access.known import Refused

log = structlog.get_logger()

WINDOW = 60.0
"""Seconds in which at most `LINES` are written."""

LINES = 20


class Failures:
    """Tells the log of refusals. `now` is a clock in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._since = now()
        self._lines = 0
        self._left_out = 0

    def tell(self, refused: Refused) -> None:
        """A line for a refusal; one that is too many is counted in the first line of later."""
        now = self._now()
        if not 0 <= now - self._since < WINDOW:
            self._since, self._lines = now, 0
        if self._lines >= LINES:
            self._left_out += 1
            return
        self._lines += 1
        left_out, self._left_out = self._left_out, 0
        more = {"left_out_before": left_out} if left_out else {}
        log.warning("a caller was refused", why=refused.why, **refused.told, **more)
