"""How long the writes of several nodes take over a PostgreSQL with a slow flush."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from random import Random

from runlane_server.store.base import Store
from support.postgres import OwnPostgres, postgres_store, with_schema
from support.story import Story

FLUSH = 0.008
SESSIONS = 8
"""Sessions per node, each with one run at a time: a small load."""

PAUSE = 0.1
"""The longest pause in seconds before a run, and before its end."""


@dataclass
class Waits:
    """Seconds that each accept, start and end took."""

    accepts: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)


async def _timed(waits: list[float], step: Awaitable[object]) -> None:
    began = time.perf_counter()
    await step
    waits.append(time.perf_counter() - began)


async def _live(store: Store, name: str, until: float, waits: Waits) -> None:
    story, n = Story(store, name), 0
    rng = Random(name)  # noqa: S311 - nothing secret
    while time.perf_counter() < until:
        n += 1
        # Without pauses the sessions of a node would write in step, their ends together.
        await asyncio.sleep(rng.uniform(0, PAUSE))
        await _timed(waits.accepts, story.accept(f"{name}-{n}"))
        await _timed(waits.starts, story.start())
        await asyncio.sleep(rng.uniform(0, PAUSE))
        await _timed(waits.ends, story.finish())


async def measure(server: OwnPostgres, nodes: int, seconds: float) -> Waits:
    """Plays runs on that many nodes, after a warm-up of a second."""
    url = with_schema(server.url, f"flushes_{secrets.token_hex(4)}")
    waits, warm = Waits(), Waits()
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(postgres_store(url)) for _ in range(nodes)]
        for found, length in ((warm, 1.0), (waits, seconds)):
            until = time.perf_counter() + length
            await asyncio.gather(
                *(
                    _live(store, f"{length}-{n}-{k}", until, found)
                    for n, store in enumerate(stores)
                    for k in range(SESSIONS)
                )
            )
    return waits
