"""Latches: named points where scripted runs wait, so that a test stages a race without a sleep.

A latch belongs to a script. The gates of a harness (`harness.gates`) hold runs of any agent.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

CHECK_SECONDS = 1.0
"""Seconds after which a test that waits at a misspelt latch gets its answer. Until then, the script
that names the latch may still be on its way."""

SIMILARITY = 0.7
"""Minimum similarity of a name to one that it is a misspelling of; 1: equal."""


class UnknownLatch(LookupError):
    """A test waits at a latch whose name looks like a misspelling of one that a script has."""


class Latches:
    """Latches by name. A latch is closed until it is opened, and then stays open."""

    def __init__(self) -> None:
        self._open: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._reached: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._cancel_ignored: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._ignoring: set[asyncio.Task[Any] | None] = set()
        self._heeding = False
        self._names: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """The latches at which scripts wait that have started so far."""
        return tuple(sorted(self._names))

    def declare(self, names: Iterable[str]) -> None:
        """Notes the latches of a script."""
        self._names.update(names)

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
        """Returns when a run has reached the latch. Raises UnknownLatch."""
        await self._wait_spelt(name, self._reached[name])

    async def cancel_ignored(self, name: str) -> None:
        """Returns when a run at the latch has ignored a cancel. Raises UnknownLatch."""
        await self._wait_spelt(name, self._cancel_ignored[name])

    async def _wait_spelt(self, name: str, event: asyncio.Event) -> None:
        while not event.is_set():
            try:
                async with asyncio.timeout(CHECK_SECONDS):
                    await event.wait()
            except TimeoutError:
                self._refuse_misspelt(name)

    def _refuse_misspelt(self, name: str) -> None:
        if name in self._names or not (meant := get_close_matches(name, self.names, 1, SIMILARITY)):
            return
        # `go2` is no misspelling of `go1`: the script with it has not started yet.
        if re.sub(r"\d", "", name) == re.sub(r"\d", "", meant[0]):
            return
        raise UnknownLatch(
            f"no script waits at latch {name!r}; did you mean {meant[0]!r}? "
            f"The latches are: {', '.join(self.names)}"
        )
