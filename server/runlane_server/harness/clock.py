"""The clock of a node, and how a harness moves it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from runlane_server.core.errors import Unsupported
from runlane_server.core.model import Micros


def monotonic_clock(now: Callable[[], Micros]) -> Callable[[], Micros]:
    """A clock that stands still while the system's is set back: no run ends before it began."""
    latest = 0

    def monotone() -> Micros:
        nonlocal latest
        latest = max(latest, now())
        return latest

    return monotone


class MovableLoop(asyncio.SelectorEventLoop):
    """An event loop that can be moved forward, by `offset` seconds in all: what was to happen until
    then happens next."""

    offset = 0.0

    def time(self) -> float:
        """Seconds of a clock that never goes back."""
        return super().time() + self.offset


def real_loop_time() -> float:
    """Seconds of the running loop's clock without what a harness has moved it by: for what goes by
    somebody else's clock."""
    loop = asyncio.get_running_loop()
    return loop.time() - (loop.offset if isinstance(loop, MovableLoop) else 0.0)


class Clock:
    """The time of day on a node: the system's, `offset` of it by so many seconds."""

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
        """Whether it can be moved: the running loop has to go with it."""
        return isinstance(asyncio.get_running_loop(), MovableLoop)

    async def advance(self, seconds: float) -> None:
        """Moves it forward together with the running loop; returns when what is due by then was
        begun. Raises Unsupported on a loop that cannot be moved."""
        loop = asyncio.get_running_loop()
        if not isinstance(loop, MovableLoop):
            raise Unsupported("the clock cannot be moved: the event loop is not this server's own")
        self.offset += seconds
        loop.offset += seconds
        # Whatever is due goes off in the next round of the loop, and what that wakes in the one
        # after it.
        for _ in range(3):
            await asyncio.sleep(0)


SYSTEM_CLOCK = Clock()
"""The system's clock, which nobody moves."""
