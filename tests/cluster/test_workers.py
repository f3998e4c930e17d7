"""Workers and several nodes: a worker reconnects to any of them, and its runs continue (R36)."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from proofs.crash.network import reached_at, target_of
from proofs.crash.proxy import Proxy
from runlane import Client
from runlane.worker import Turn
from support.server import ServerProcess, clean_environment
from support.staging import SECONDS
from support.workers import (
    Counter,
    RawWorker,
    accept,
    check_whole,
    followed,
    requested,
    until_streaming,
    working,
)

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


async def test_r36_a_run_whose_worker_was_lost_in_an_outage_is_retried_after_it(
    postgres_url: str, tmp_path: Path
) -> None:
    """The database falls silent for longer than the lease, and no other node declares this one
    dead: it must itself find the runs that it has given up."""
    async with AsyncExitStack() as closing:
        line = await closing.enter_async_context(Proxy())
        line.target = target_of(postgres_url)
        url = reached_at(postgres_url, "127.0.0.1", line.port)
        flags = ("--agent", "worker", "--node-lease", "2s", "--worker-lease", "2s")
        env = {**clean_environment(), "RUNLANE_STORE": url}
        node = ServerProcess(tmp_path, *flags, "--log-format", "json", base=env)
        closing.push_async_callback(node.kill)
        await node.start()
        client = await closing.enter_async_context(Client(node.address, timeout=60))
        run = await accept(client, "s", "x", max_attempts=2)
        async with RawWorker(node.address) as worker:
            assert (await worker.turn()).attempt == 1
            line.cut(reset=False)
            # It receives the order to leave the attempt, and does not return.
            await worker.end()
        line.mend()
        async with RawWorker(node.address) as worker:
            assert (await worker.turn()).attempt == 2
            await worker.finish(0)
            # The worker stays: a stream that ends may take its last message along.
            end = await run.completed()
        assert (end.state, end.attempt) == ("completed", 2)


async def test_r44_an_answer_given_while_the_node_of_a_worker_is_away_reaches_it(
    postgres_url: str, tmp_path: Path
) -> None:
    async def agent(turn: Turn) -> str:
        return str(await turn.ask("well?"))

    async with AsyncExitStack() as closing:
        nodes = []
        for n in range(2):
            (tmp_path / str(n)).mkdir()
            flags = ("--agent", "worker", "--log-format", "json", "--node-lease", "4s")
            env = {**clean_environment(), "RUNLANE_STORE": postgres_url}
            node = ServerProcess(tmp_path / str(n), *flags, base=env)
            closing.push_async_callback(node.kill)
            await node.start()
            nodes.append(node)
        away, other = nodes
        await closing.enter_async_context(working(away.address, {"default": agent}))
        client = await closing.enter_async_context(Client(other.address, timeout=60))
        handle = await accept(client, "s", "x")
        request = await requested(client, handle.run_id)
        await away.stop(signal.SIGKILL)
        await client.answer_input(request, "yes")
        await away.start()
        end = await handle.completed(SECONDS)
        assert (end.text, end.attempt) == ("yes", 2)
