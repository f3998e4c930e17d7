"""The calls in progress, so that a shutdown can wait for the last of them."""

from __future__ import annotations

import asyncio
from collections.abc import Collection


class InflightCalls:
    """Holds the task of every handler that has not returned.

    `grpc.aio.Server.stop` returns before handlers have cleaned up (grpc#37239).
    """

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[object], str] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def methods(self) -> Collection[str]:
        """The method of each call."""
        return self._tasks.values()

    def add(self, task: asyncio.Task[object], method: str = "") -> None:
        """Adds the task of a handler that starts."""
        self._tasks[task] = method

    def discard(self, task: asyncio.Task[object]) -> None:
        """Removes the task of a handler that returns."""
        self._tasks.pop(task, None)

    async def wait_idle(self, timeout: float) -> bool:
        """Waits up to `timeout` seconds until no handler runs; returns whether none does."""
        others = self._tasks.keys() - {asyncio.current_task()}
        if not others:
            return True
        _, running = await asyncio.wait(others, timeout=timeout)
        return not running
