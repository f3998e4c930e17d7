"""Latches: named points where scripted runs wait, so that a test stages a race without a sleep.

A latch belongs to a script. The gates of a harness (`harness.gates`) hold runs of any agent.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any


class Latches:
    """Latches by name. A latch is closed until it is opened, and then stays open."""

    def __init__(self) -> None:
        self._open: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._reached: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._cancel_ignored: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._ignoring: set[asyncio.Task[Any] | None] = set()
        self._heeding = False

    def open(self, name: str) -> None:
        """Opens a latch, for runs that wait at it and for later ones."""
        self._open[name].set()

    async def wait(self, name: str) -> None:
        """Waits until the latch is open."""
        self._reached[name].set()
        await self._open[name].wait()

    async def wait_through_cancels(self, name: str) -> None:
        """Waits until the latch is open, and ignores cancels of the task."""
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
        """Stops ignoring cancels, and delivers those that were ignored so far."""
        self._heeding = True
        for task in filter(None, self._ignoring):
            task.cancel()

    async def reached(self, name: str) -> None:
        """Returns when a run has reached the latch."""
        await self._reached[name].wait()

    async def cancel_ignored(self, name: str) -> None:
        """Returns when a run at the latch has ignored a cancel."""
        await self._cancel_ignored[name].wait()
