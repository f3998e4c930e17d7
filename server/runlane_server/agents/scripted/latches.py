"""Named gates that scripted runs wait at, so that a race can be staged without a sleep."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any


class Latches:
    """Gates by name. A gate is closed until it is opened, and then stays open."""

    def __init__(self) -> None:
        self._open: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._reached: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._cancel_ignored: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._ignoring: set[asyncio.Task[Any] | None] = set()
        self._heeding = False

    def open(self, name: str) -> None:
        """Lets through all that wait at the gate, and all that will."""
        self._open[name].set()

    async def wait(self, name: str) -> None:
        """Waits until the gate is open."""
        self._reached[name].set()
        await self._open[name].wait()

    async def wait_through_cancels(self, name: str) -> None:
        """Waits until the gate is open, and takes no notice of being cancelled."""
        task = asyncio.current_task()
        try:
            while not self._open[name].is_set():
                try:
                    await self.wait(name)
                except asyncio.CancelledError:
                    if self._heeding:
                        raise
                    self._ignoring.add(task)
                    self._cancel_ignored[name].set()
        finally:
            self._ignoring.discard(task)

    def heed_cancels(self) -> None:
        """Has every cancel noticed from now on, and those that were not noticed before."""
        self._heeding = True
        for task in filter(None, self._ignoring):
            task.cancel()

    async def reached(self, name: str) -> None:
        """Returns when some run has come to the gate."""
        await self._reached[name].wait()

    async def cancel_ignored(self, name: str) -> None:
        """Returns when some run was cancelled at the gate, and went on waiting."""
        await self._cancel_ignored[name].wait()
