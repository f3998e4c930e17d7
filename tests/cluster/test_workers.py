"""Workers and several nodes: a worker reconnects to any of them, and its runs continue (R36)."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from runlane import Client
from support.server import ServerProcess, clean_environment
from support.workers import Counter, accept, check_whole, followed, until_streaming, working

NODES = 3
RUNS = 24


@pytest.mark.timeout(300)
async def test_r36_a_rolling_restart_of_three_nodes_interrupts_no_run_of_a_worker(
    postgres_url: str, tmp_path: Path
) -> None:
    counter = Counter()
    async with AsyncExitStack() as closing:
        nodes = []
        for n in range(NODES):
            (tmp_path / str(n)).mkdir()
            flags = ("--agent", "worker", "--log-format", "json", "--node-lease", "4s")
            env = {**clean_environment(), "RUNLANE_STORE": postgres_url}
            node = ServerProcess(tmp_path / str(n), *flags, base=env)
            closing.push_async_callback(node.kill)
            await node.start()
            nodes.append(node)
        targets = [node.address for node in nodes]
        await closing.enter_async_context(working(targets, {"default": counter.run}, slots=RUNS))
        clients = [
            await closing.enter_async_context(Client(target, timeout=60)) for target in targets
        ]
        handles = [await accept(clients[n % NODES], f"s{n}", "count") for n in range(RUNS)]
        following = [asyncio.create_task(followed(handle)) for handle in handles]
        for n, node in enumerate([*nodes, *nodes]):
            await until_streaming(clients[(n + 1) % NODES], handles)
            await node.stop(signal.SIGKILL if n % 2 else signal.SIGTERM)
            await node.start()
        await until_streaming(clients[0], handles)
        counter.may_end.set()
        for handle, events in zip(handles, await asyncio.gather(*following), strict=True):
            check_whole(events, counter.said[handle.run_id])
