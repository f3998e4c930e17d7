"""The clock of a node."""

from __future__ import annotations

from collections.abc import Callable

from runlane_server.core.model import Micros


def never_back(now: Callable[[], Micros]) -> Callable[[], Micros]:
    """A clock that stands still while the system's is set back: no run ends before it began."""
    latest = 0

    def monotone() -> Micros:
        nonlocal latest
        latest = max(latest, now())
        return latest

    return monotone
