"""The clock of a node, and how a harness advances it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from runlane_server.core.errors import Unsupported
from runlane_server.core.model import Micros


def monotonic_clock(now: Callable[[], Micros]) -> Callable[[], Micros]:
    """Returns `now` made monotonic: it stands still while the system clock is set back, so that no
    run ends before it began."""
    latest = 0

    def monotonic() -> Micros:
        nonlocal latest
        latest = max(latest, now())
        return latest

    return monotonic


class MovableLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock a harness can advance: `offset` is the total, in seconds.

    Timers that are due by the new time fire in the next iteration.
    """

    offset = 0.0

    def time(self) -> float:
        """Seconds of a monotonic clock."""
        return super().time() + self.offset


def real_loop_time() -> float:
    """The time of the running loop in seconds, without what a harness advanced it by.

    For intervals that another clock measures too, such as a lease in the store.
    """
    loop = asyncio.get_running_loop()
    return loop.time() - (loop.offset if isinstance(loop, MovableLoop) else 0.0)


class Clock:
    """The time of day on a node: the system's, plus `offset` seconds."""

    def __init__(self, offset: float = 0.0) -> None:
        self.offset = offset

    def seconds(self) -> float:
        """Seconds since 1970."""
        return time.time() + self.offset

    def micros(self) -> Micros:
        """Microseconds since 1970."""
        return time.time_ns() // 1000 + round(self.offset * 1e6)

    @property
    def can_advance(self) -> bool:
        """Whether the running loop is a `MovableLoop`: the two clocks advance together."""
        return isinstance(asyncio.get_running_loop(), MovableLoop)

    async def advance(self, seconds: float) -> None:
        """Advances this clock and the running loop; returns once the timers that are due by then
        have fired. Raises Unsupported if the loop is not a `MovableLoop`."""
        loop = asyncio.get_running_loop()
        if not isinstance(loop, MovableLoop):
            raise Unsupported(
                "the clock cannot be advanced: the event loop does not belong to this server"
            )
        self.offset += seconds
        loop.offset += seconds
        # Timers fire in the next iteration of the loop; tasks that they wake run in the one after.
        for _ in range(3):
            await asyncio.sleep(0)


SYSTEM_CLOCK = Clock()
"""The system clock. It is never advanced."""
