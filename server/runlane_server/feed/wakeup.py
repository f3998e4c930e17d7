"""Waiting to be woken, or for a time to come: for those who wait again and again."""

from __future__ import annotations

import asyncio


class Wakeup:
    """What one task waits for. A wake-up that comes while nobody waits is lost: whoever waits looks
    first whether there is a reason to.

    The alarm of one wait serves the next ones; one that is too early is set anew when it goes off.
    A timeout for each wait would cost more than all that is done about what ends it.
    """

    __slots__ = ("_loop", "_timer", "_until", "_waiter")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._until = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def after(self, seconds: float) -> float:
        """The time of the loop that is so many seconds from now."""
        return self._loop.time() + seconds

    def past(self, until: float) -> bool:
        """Whether that time of the loop has come."""
        return self._loop.time() >= until

    async def wait(self, until: float) -> None:
        """Returns when it is woken, or at that time of the loop."""
        self._until = until
        if self._timer is None or self._timer.when() > until:
            self._start_timer()
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        """Wakes whoever waits."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """Leaves no alarm behind. Nobody waits any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start_timer(self) -> None:
        self.close()
        self._timer = self._loop.call_at(self._until, self._on_timer, self._until)

    def _on_timer(self, at: float) -> None:
        self._timer = None
        if self._waiter is None:
            return
        if at < self._until:
            self._start_timer()
        else:
            self.wake()
