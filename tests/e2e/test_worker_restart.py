"""Nodes stop, die and start while workers execute runs: no run is interrupted (R36)."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from runlane import Client, RunState
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


class Asker:
    """An agent that takes a step, asks, and takes the step again. `done` is the work done."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.has_stepped = asyncio.Event()
        self.may_go_on = asyncio.Event()

    async def run(self, turn: Turn) -> str:
        """Asks what the prompt says."""
        first = await turn.step("read", lambda: self._work("read"))
        self.has_stepped.set()
        await self.may_go_on.wait()
        again = await turn.step("read", lambda: self._work("read again"))
        answer = "nothing" if turn.prompt.text == "no" else await turn.ask(turn.prompt.text)
        return f"{first} {again} {answer} in attempt {turn.attempt}"

    def _work(self, name: str) -> str:
        self.done.append(name)
        return name


@pytest.mark.sqlite("it restarts the only server of a file")
@pytest.mark.parametrize("number", SIGNALS)
async def test_r39_a_step_is_not_repeated_after_a_restart(
    tmp_path: Path, number: signal.Signals
) -> None:
    asker = Asker()
    node = server(tmp_path, f"sqlite:///{tmp_path}/r.db")
    async with AsyncExitStack() as closing:
        closing.push_async_callback(node.kill)
        await node.start()
        await closing.enter_async_context(working(node.address, {"default": asker.run}))
        client = await closing.enter_async_context(Client(node.address, timeout=60))
        handle = await accept(client, "s", "no")
        async with asyncio.timeout(SECONDS):
            await asker.has_stepped.wait()
        await node.stop(number)
        await node.start()
        asker.may_go_on.set()
        end = await handle.completed(SECONDS)
        assert (end.text, end.attempt) == ("read read nothing in attempt 1", 1)
        assert asker.done == ["read"]


@pytest.mark.sqlite("it restarts the only server of a file")
@pytest.mark.parametrize("number", SIGNALS)
async def test_r44_a_question_outlives_the_server_and_the_worker(
    tmp_path: Path, number: signal.Signals
) -> None:
    asker = Asker()
    asker.may_go_on.set()
    agents = {"default": asker.run}
    node = server(tmp_path, f"sqlite:///{tmp_path}/r.db")
    async with AsyncExitStack() as closing:
        closing.push_async_callback(node.kill)
        await node.start()
        client = await closing.enter_async_context(Client(node.address, timeout=60))
        async with working(node.address, agents):
            handle = await accept(client, "s", "well?", max_attempts=1)
            request = await requested(client, handle.run_id)
            await node.stop(number)
            await node.start()
        # The worker is gone too.
        await client.answer_input(request, "yes")
        assert (await client.get_run(handle.run_id)).state == "input_required"
        async with working(node.address, agents):
            end = await handle.completed(SECONDS)
        assert end.text == "read read yes in attempt 2"
        assert asker.done == ["read"]


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
