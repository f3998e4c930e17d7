"""Nodes stop, die and start while workers execute runs: no run is interrupted (R36)."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from runlane import Client
from support.server import ServerProcess, clean_environment
from support.workers import Counter, accept, check_whole, followed, until_streaming, working

RUNS = 20

SIGNALS = (signal.SIGTERM, signal.SIGKILL)


def server(folder: Path, store: str, *flags: str) -> ServerProcess:
    folder.mkdir(exist_ok=True)
    command = ("--store", store, "--agent", "worker", "--log-format", "json", *flags)
    return ServerProcess(folder, *command, base=clean_environment())


@pytest.mark.sqlite("it restarts the only server of a file")
@pytest.mark.timeout(300)
async def test_r36_no_run_of_a_worker_is_interrupted_by_ten_restarts(tmp_path: Path) -> None:
    counter = Counter()
    node = server(tmp_path, f"sqlite:///{tmp_path}/r.db")
    async with AsyncExitStack() as closing:
        closing.push_async_callback(node.kill)
        await node.start()
        agents = {"default": counter.run}
        await closing.enter_async_context(working(node.address, agents, slots=RUNS))
        client = await closing.enter_async_context(Client(node.address, timeout=60))
        handles = [await accept(client, f"s{n}", "count") for n in range(RUNS)]
        following = [asyncio.create_task(followed(handle)) for handle in handles]
        for restart in range(10):
            await until_streaming(client, handles)
            await node.stop(SIGNALS[restart % 2])
            await node.start()
        await until_streaming(client, handles)
        counter.may_end.set()
        for handle, events in zip(handles, await asyncio.gather(*following), strict=True):
            check_whole(events, counter.said[handle.run_id])
