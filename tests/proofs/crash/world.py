"""What the clients of a round share: the counter, the history, and where the server is."""

from __future__ import annotations

import asyncio
import heapq
import random
from dataclasses import dataclass, field

from proofs.crash.history import History
from runlane import RunlaneError
from runlane.errors import is_transient


@dataclass(slots=True)
class World:
    """`up` is set while the server is meant to serve, `over` once no new work is to be sent.

    `listening` are the subscriptions and followers, which end by themselves when all runs have.
    A call is given up after `timeout` seconds; a stream after `stay`, to be resumed. `cancels` is
    the share that is sent of the cancels that come to mind.
    """

    rng: random.Random
    sessions: tuple[str, ...]
    address: str = ""
    timeout: float = 10.0
    stay: float | None = None
    cancels: float = 1.0
    history: History = field(default_factory=History)
    up: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    listening: list[asyncio.Task[None]] = field(default_factory=list)
    now: int = 0
    _waiting: list[tuple[int, int, asyncio.Event]] = field(default_factory=list)

    def tick(self) -> int:
        """A number for something that is sent or has come."""
        self.now += 1
        while self._waiting and self._waiting[0][0] <= self.now:
            heapq.heappop(self._waiting)[2].set()
        return self.now

    async def reached(self, number: int) -> None:
        """Returns as soon as that number was given out."""
        if number > self.now:
            event = asyncio.Event()
            heapq.heappush(self._waiting, (number, id(event), event))
            await event.wait()

    def pick(self) -> str:
        """The address for a new connection."""
        return self.address

    def is_lost(self, error: RunlaneError) -> bool:
        """Whether an error is a reason to connect anew."""
        return is_transient(error) and not error.reason

    async def serving(self) -> None:
        """Returns while the server is meant to serve."""
        # What was lost a moment ago may be found lost again before the end of the server is seen.
        await asyncio.sleep(0.05)
        await self.up.wait()
