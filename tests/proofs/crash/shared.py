"""The state that the clients of a round share: counter, history and server address."""

from __future__ import annotations

import asyncio
import heapq
import random
from dataclasses import dataclass, field

from proofs.crash.history import History
from runlane import RunlaneError
from runlane.errors import is_transient


@dataclass(slots=True)
class SharedState:
    """`up` is set while the server should serve; `over` once clients should send no new work.

    `listening` are the subscriptions and followers, which end by themselves after the last runs.
    `timeout` is that of a call in seconds; a stream is resumed after `stay` seconds. `cancels` is
    the fraction of the drawn cancels that is sent. `agents` are those that runs name.
    """

    rng: random.Random
    sessions: tuple[str, ...]
    address: str = ""
    timeout: float = 10.0
    stay: float | None = None
    cancels: float = 1.0
    agents: tuple[str, ...] = ("",)
    history: History = field(default_factory=History)
    up: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    listening: list[asyncio.Task[None]] = field(default_factory=list)
    now: int = 0
    _waiting: list[tuple[int, int, asyncio.Event]] = field(default_factory=list)

    def tick(self) -> int:
        """The next number, for a message that is sent or received."""
        self.now += 1
        while self._waiting and self._waiting[0][0] <= self.now:
            heapq.heappop(self._waiting)[2].set()
        return self.now

    async def reached(self, number: int) -> None:
        """Returns once the counter has reached a number."""
        if number > self.now:
            event = asyncio.Event()
            heapq.heappush(self._waiting, (number, id(event), event))
            await event.wait()

    def pick(self) -> str:
        """The address for a new connection."""
        return self.address

    def is_lost(self, error: RunlaneError) -> bool:
        """Whether an error is a reason to reconnect."""
        return is_transient(error) and not error.reason

    async def serving(self) -> None:
        """Returns once the server should serve."""
        # A client may lose a second connection before it can observe the end of the server.
        await asyncio.sleep(0.05)
        await self.up.wait()
