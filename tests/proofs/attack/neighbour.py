"""A quiet tenant that works while others attack, and measures what it notices."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from runlane import Client
from support.staging import SECONDS

PACE = 0.05
"""Seconds between two rounds of calls."""


@dataclass
class Noticed:
    """The worst latency of each kind of call in seconds, and the runs that were lost."""

    worst: dict[str, float] = field(default_factory=dict)
    runs: int = 0
    lost: int = 0

    @asynccontextmanager
    async def timed(self, call: str) -> AsyncIterator[None]:
        """Measures a call."""
        began = time.perf_counter()
        yield
        self.worst[call] = max(self.worst.get(call, 0.0), time.perf_counter() - began)

    def __str__(self) -> str:
        worst = ", ".join(f"{call} {1000 * took:.0f} ms" for call, took in self.worst.items())
        return f"{worst}; {self.runs} runs, {self.lost} lost"


async def live(address: str, token: str, attack: asyncio.Task[None]) -> Noticed:
    """Accepts, lists, subscribes and cancels until the attack is over, and then counts its runs."""
    noticed = Noticed()
    seen: set[str] = set()
    accepted: set[str] = set()
    async with Client(address, token=token) as client:

        async def receive() -> None:
            async for complete in client.subscribe_run_complete(from_beginning=True):
                seen.add(complete.run_id)

        receiver = asyncio.create_task(receive())
        accepted.add(await _round(client, Noticed()))  # The first calls open the connection.
        while not attack.done():
            accepted.add(await _round(client, noticed))
            await asyncio.sleep(PACE)
        deadline = time.monotonic() + SECONDS
        while accepted - seen and time.monotonic() < deadline and not receiver.done():
            await asyncio.sleep(PACE)
        receiver.cancel()
        await asyncio.wait([receiver])
    noticed.runs, noticed.lost = len(accepted), len(accepted - seen)
    return noticed


async def _round(client: Client, noticed: Noticed) -> str:
    """Makes one call of each kind for a new run; returns its id."""
    async with noticed.timed("accept"):
        handle = await client.run_accepted(f"q{noticed.runs % 7}", "hello\n", allow_missing=True)
    noticed.runs += 1
    async with noticed.timed("list"):
        await anext(aiter(client.list_runs(page_size=10)))
    async with noticed.timed("subscribe"), handle.events() as events:
        await anext(events)
    async with noticed.timed("cancel"):
        await handle.cancel()
    return handle.run_id
