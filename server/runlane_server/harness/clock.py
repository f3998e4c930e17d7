"""The clock of a node, and how a harness moves it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from runlane_server.core.errors import Unsupported
from runlane_server.core.model import Micros


def never_back(now: Callable[[], Micros]) -> Callable[[], Micros]:
    """A clock that stands still while the system's is set back: no run ends before it began."""
    latest = 0

    def monotone() -> Micros:
        nonlocal latest
        latest = max(latest, now())
        return latest

    return monotone


class MovableLoop(asyncio.SelectorEventLoop):
    """An event loop that can be moved forward, by `ahead` seconds in all: what was to happen until
    then happens next."""

    ahead = 0.0

    def time(self) -> float:
        """Seconds of a clock that never goes back."""
        return super().time() + self.ahead


def unmoved_time() -> float:
    """Seconds of the running loop's clock without what a harness has moved it by: for what goes by
    somebody else's clock."""
    loop = asyncio.get_running_loop()
    return loop.time() - (loop.ahead if isinstance(loop, MovableLoop) else 0.0)


class Clock:
    """The time of day on a node: the system's, `ahead` of it by so many seconds."""

    def __init__(self, ahead: float = 0.0) -> None:
        self.ahead = ahead

    def seconds(self) -> float:
        """Seconds since 1970."""
        return time.time() + self.ahead

    def micros(self) -> Micros:
        """Microseconds since 1970."""
        return time.time_ns() // 1000 + round(self.ahead * 1e6)

    @property
    def movable(self) -> bool:
        """Whether it can be moved: the running loop has to go with it."""
        return isinstance(asyncio.get_running_loop(), MovableLoop)

    async def advance(self, seconds: float) -> None:
        """Moves it forward together with the running loop; returns when what is due by then was
        begun. Raises Unsupported on a loop that cannot be moved."""
        loop = asyncio.get_running_loop()
        if not isinstance(loop, MovableLoop):
            raise Unsupported("the clock cannot be moved: the event loop is not this server's own")
        self.ahead += seconds
        loop.ahead += seconds
        # Whatever is due goes off in the next round of the loop, and what that wakes in the one
        # after it.
        for _ in range(3):
            await asyncio.sleep(0)


SYSTEM = Clock()
"""The system's clock, which nobody moves."""
