"""A wait for a wake-up or a deadline, cheap enough to be repeated for every event."""

from __future__ import annotations

import asyncio


class Wakeup:
    """Wakes one waiting task. A wake-up while no task waits is lost, so the task must check its
    condition before it waits.

    The timer of one wait also serves later ones; if it fires too early, it is restarted. A timeout
    per wait would cost more than the handling of the event that ends it.
    """

    __slots__ = ("_loop", "_timer", "_until", "_waiter")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._until = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def after(self, seconds: float) -> float:
        """The time of the loop in this many seconds."""
        return self._loop.time() + seconds

    def past(self, until: float) -> bool:
        """Whether a time of the loop has come."""
        return self._loop.time() >= until

    async def wait(self, until: float) -> None:
        """Returns when woken, or at a time of the loop."""
        self._until = until
        if self._timer is None or self._timer.when() > until:
            self._start_timer()
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        """Wakes the waiting task, if there is one."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """Stops the timer. No task may wait any more."""
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
