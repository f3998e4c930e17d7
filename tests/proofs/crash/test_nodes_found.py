"""Defects that rounds of several nodes found, other than in ordering, reproduced step by step."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest

from proofs.crash.network import reached_at, target_of
from proofs.crash.proxy import Proxy
from runlane import Client, TextDelta
from runlane.worker import Turn
from runlane_server.core.model import SessionKey
from support.server import ServerProcess, clean_environment
from support.staging import SECONDS
from support.workers import accept, check_whole, followed, working

pytest.importorskip("asyncpg", reason="asyncpg is not installed")

from support.postgres import fresh_database, own_postgres, postgres_store, skip_without_wheel


async def test_r09_a_cancelled_agent_does_not_wait_for_an_unreachable_database(
    postgres_url: str,
) -> None:
    """Otherwise an agent that reads the transcript would outlive the lease of its node."""
    key = SessionKey("default", "s")
    async with Proxy() as proxy:
        proxy.target = target_of(postgres_url)
        async with postgres_store(reached_at(postgres_url, "127.0.0.1", proxy.port)) as store:
            await store.load_lane(key)
            proxy.cut(reset=False)
            reading = asyncio.create_task(store.load_lane(key))
            await proxy.holding.wait()
            reading.cancel()
            with suppress(asyncio.CancelledError):
                async with asyncio.timeout(SECONDS / 10):
                    await reading
            assert reading.cancelled()
            proxy.mend()
            assert (await store.load_lane(key)).active is None


class Quiet:
    """An agent that says nothing for a while: on a busy stream, a lost peer shows at once."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()

    async def run(self, turn: Turn) -> AsyncGenerator[str, None]:
        """Says something, and later the end."""
        yield "so far "
        await self.may_end.wait()
        yield "end"


@pytest.mark.timeout(240)
async def test_r36_a_worker_leaves_nodes_that_vanished_within_its_lease(tmp_path: Path) -> None:
    """The node of its run falls silent, and so does the one that it tries next."""
    skip_without_wheel()
    agent = Quiet()
    async with AsyncExitStack() as closing:
        base = closing.enter_context(own_postgres()).url
        url = await closing.enter_async_context(fresh_database(base))
        nodes = [_node(tmp_path / str(number), url) for number in range(3)]
        for node in nodes:
            closing.push_async_callback(node.kill)
            await node.start()
        links = [await closing.enter_async_context(Proxy()) for _ in nodes[1:]]
        for link, node in zip(links, nodes, strict=False):
            host, _, port = node.address.rpartition(":")
            link.target = (host, int(port))
        targets = [*(f"127.0.0.1:{link.port}" for link in links), nodes[2].address]
        await closing.enter_async_context(working(targets, {"default": agent.run}))
        client = await closing.enter_async_context(Client(nodes[2].address, timeout=60))
        handle = await accept(client, "s", "count", max_attempts=1)
        async for event in handle.events():
            if isinstance(event.body, TextDelta):
                break
        for link, node in zip(links, nodes, strict=False):
            link.cut(reset=False)
            node.send(signal.SIGSTOP)
        agent.may_end.set()
        end = check_whole(await followed(handle), "so far end")
        print(f"ended {(end.ended_at - event.time).total_seconds():.1f} s after the nodes vanished")


def _node(folder: Path, store: str) -> ServerProcess:
    folder.mkdir()
    flags = ("--agent", "worker", "--worker-lease", "30s", "--node-lease", "2s")
    return ServerProcess(folder, "--store", store, *flags, base=clean_environment())
