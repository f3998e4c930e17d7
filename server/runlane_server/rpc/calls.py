"""The calls that are being handled, so that a shutdown can wait for the last of them."""

from __future__ import annotations

import asyncio
from collections.abc import Collection


class Calls:
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

    def enter(self, task: asyncio.Task[object], method: str = "") -> None:
        """The handler of a method was called."""
        self._tasks[task] = method

    def leave(self, task: asyncio.Task[object]) -> None:
        """A handler returns."""
        self._tasks.pop(task, None)

    async def finished(self, timeout: float) -> bool:
        """Waits until no handler runs; returns whether that came true within `timeout` seconds."""
        others = self._tasks.keys() - {asyncio.current_task()}
        if not others:
            return True
        _, running = await asyncio.wait(others, timeout=timeout)
        return not running
