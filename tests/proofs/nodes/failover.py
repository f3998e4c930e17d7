"""How long survivors take to recover the runs of a node that is gone."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

import asyncpg

from runlane_server.core.limits import Limits
from runlane_server.core.model import TextDelta
from runlane_server.engine.executor import NodeSettings
from runlane_server.store.base import Store
from support.node import Node, running
from support.postgres import OwnPostgres, plain, postgres_store, with_schema
from support.story import Story, request

GONE = "gone"
LEASE = 2.0
SURVIVORS = 2
AT_ONCE = 256
LONGEST = 120.0

_LEFT = "SELECT count(*) FROM runs WHERE ended_at IS NULL AND host = $1"


async def _seed(store: Store, runs: int) -> None:
    """Makes runs active on a node that is alive no more, each with some output."""
    assert store.cluster is not None
    places = asyncio.Semaphore(AT_ONCE)

    async def seed(n: int) -> None:
        async with places:
            story = Story(store, f"s{n}", tenant="default")
            await story.accept(request(f"r{n}")._replace(max_attempts=1))
            await story.start(GONE)
            await story.append(TextDelta("some output"))

    await asyncio.gather(*map(seed, range(runs)))


@asynccontextmanager
async def _node(url: str) -> AsyncIterator[Node]:
    limits = Limits(max_active_runs=256)
    async with (
        postgres_store(url) as store,
        running(store, limits=limits, node=NodeSettings(lease=LEASE)) as node,
    ):
        yield node


async def measure(
    server: OwnPostgres,
    runs: int,
    survivor: Callable[[str], AbstractAsyncContextManager[object]] = _node,
) -> float:
    """Seconds from the first recovered run to the last one, with two survivors over the URL of a
    store. All runs end as interrupted."""
    url = with_schema(server.url, f"failover_{secrets.token_hex(4)}")
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(postgres_store(url))
        assert store.cluster is not None
        await store.cluster.join(GONE, "")
        await _seed(store, runs)
        beside = await plain(url)
        stack.push_async_callback(beside.close)
        for _ in range(SURVIVORS):
            await stack.enter_async_context(survivor(url))
        await store.cluster.leave(GONE)
        async with asyncio.timeout(LONGEST):
            began = await _until(beside, runs - 1)
            return await _until(beside, 0) - began


async def _until(beside: asyncpg.Connection[asyncpg.Record], most: int) -> float:
    """The time at which at most so many runs are still active on the node that is gone."""
    while await beside.fetchval(_LEFT, GONE) > most:
        await asyncio.sleep(0.01)
    return time.perf_counter()
