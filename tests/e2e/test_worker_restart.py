"""Nodes stop, die and start while workers execute runs: no run is interrupted (R36)."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from runlane import Client, RunState
from support.server import ServerProcess, clean_environment
from support.staging import SECONDS
from support.workers import (
    Counter,
    RawWorker,
    accept,
    check_whole,
    followed,
    resume_of,
    until_streaming,
    working,
)

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


@pytest.mark.sqlite("it restarts the only server of a file")
async def test_r09_a_cancelled_run_of_a_worker_is_active_after_a_crash_until_it_has_stopped(
    tmp_path: Path,
) -> None:
    node = server(tmp_path, f"sqlite:///{tmp_path}/r.db", "--cancel-grace", "30s")
    async with AsyncExitStack() as closing:
        closing.push_async_callback(node.kill)
        await node.start()
        client = await closing.enter_async_context(Client(node.address, timeout=SECONDS))
        handle = await accept(client, "s", "hello")
        async with RawWorker(node.address) as worker:
            turn = await worker.turn()
            await worker.emit(1, "so far")
            await worker.acked(1)
            await client.cancel("s")
            await worker.expect("cancel")
            await node.kill()
        await node.start()
        async with RawWorker(node.address) as worker:
            await worker.offer(resume=resume_of(turn))
            await worker.acked(1)
            await worker.expect("cancel")
            assert (await client.get_run(handle.run_id)).state == RunState.CANCELLING
            await worker.finish(1)
            assert (await worker.expect("acked")).ended
        end = await handle.completed(SECONDS)
        assert (end.state, end.text) == (RunState.CANCELLED, "so far")
