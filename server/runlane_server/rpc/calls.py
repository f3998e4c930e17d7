"""The calls that are being handled, so that a shutdown can wait for the last of them."""

from __future__ import annotations

import asyncio


class Calls:
    """Holds the task of every handler that has not returned.

    `grpc.aio.Server.stop` returns before handlers have cleaned up (grpc#37239).
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def enter(self, task: asyncio.Task[object]) -> None:
        """A handler was called."""
        self._tasks.add(task)

    def leave(self, task: asyncio.Task[object]) -> None:
        """A handler returns."""
        self._tasks.discard(task)

    async def finished(self, timeout: float) -> bool:
        """Waits until no handler runs; returns whether that came true within `timeout` seconds."""
        others = self._tasks - {asyncio.current_task()}
        if not others:
            return True
        _, running = await asyncio.wait(others, timeout=timeout)
        return not running
