"""Logs failed authentications, at a bounded rate."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from runlane_server.access.caller import AuthenticationFailed

log = structlog.get_logger()

WINDOW = 60.0
"""Seconds in which at most `LINES` lines are written."""

LINES = 20


class FailureLog:
    """Writes a log line per failed authentication. `now` is a clock in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._window_start = now()
        self._lines = 0
        self._suppressed = 0

    def record(self, failure: AuthenticationFailed, peer: str = "") -> None:
        """Logs a failure. Above the rate it is only counted, in the next line that is written."""
        now = self._now()
        if not 0 <= now - self._window_start < WINDOW:
            self._window_start, self._lines = now, 0
        if self._lines >= LINES:
            self._suppressed += 1
            return
        self._lines += 1
        suppressed, self._suppressed = self._suppressed, 0
        more: dict[str, object] = {"suppressed_before": suppressed} if suppressed else {}
        if peer:
            more["peer"] = peer
        log.warning("authentication failed", reason=failure.reason, **failure.details, **more)
