"""A session stays busy while code that its stopped run started still works (R9)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import pytest
import structlog

from runlane_server.agents.base import AgentEvent, Turn
from runlane_server.core.limits import Limits
from runlane_server.core.model import Prompt, RunKey, RunState, TextDelta
from runlane_server.core.observer import Observer
from runlane_server.store.base import Store
from support.node import Node, running
from support.staging import SECONDS

pytestmark = pytest.mark.stores("memory", "sqlite")


@dataclass
class Starter:
    """An agent whose first run starts a task that works until `released`, and ignores cancels.

    `depth`: that many tasks start one another before.
    """

    depth: int = 0
    released: asyncio.Event = field(default_factory=asyncio.Event)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self) -> None:
        pass

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        if turn.prompt.text != "start":
            yield TextDelta("next")
            return
        yield TextDelta("begun")
        self.tasks.append(asyncio.create_task(self._work(self.depth)))
        await asyncio.Event().wait()

    async def _work(self, depth: int) -> None:
        if depth:
            self.tasks.append(asyncio.create_task(self._work(depth - 1)))
            return
        self.started.set()
        await self.released.wait()

    async def close(self) -> None:
        pass


class Counting(Observer):
    def __init__(self) -> None:
        self.fenced_off: list[str] = []

    def on_fenced_off(self, key: RunKey) -> None:
        self.fenced_off.append(key.run_id)


async def cancelled_at_work(node: Node, agent: Starter, **options: int) -> str:
    """Starts the run, waits until its task works, and cancels it; returns its id."""
    accepted = await node.accept("s", "start", **options)
    await agent.started.wait()
    if "timeout" not in options:
        await node.coordinator.cancel("s")
    return accepted.run.run_id


@pytest.mark.parametrize("depth", [0, 2])
async def test_r09_a_session_is_busy_until_the_tasks_of_its_cancelled_run_have_ended(
    store: Store, depth: int
) -> None:
    agent, observer = Starter(depth), Counting()
    limits = Limits(cancel_grace=SECONDS)
    async with running(store, agent=agent, limits=limits, observer=observer) as node:
        run_id = await cancelled_at_work(node, agent)
        waiting = await node.accept("s", "x")
        # Another session gets through a whole run meanwhile.
        await node.coordinator.run("t", Prompt("x"))
        assert await node.state(run_id) is RunState.CANCELLING
        assert await node.state(waiting.run.run_id) is RunState.QUEUED
        agent.released.set()
        assert (await node.end(run_id)).state is RunState.CANCELLED
        assert (await node.end(waiting.run.run_id)).text == "next"
        assert observer.fenced_off == []


async def test_r09_a_task_that_outlives_the_grace_is_fenced_off_logged_and_counted(
    store: Store,
) -> None:
    agent, observer = Starter(), Counting()
    limits = Limits(cancel_grace=0.2)
    with structlog.testing.capture_logs() as logged:
        async with running(store, agent=agent, limits=limits, observer=observer) as node:
            run_id = await cancelled_at_work(node, agent)
            async with asyncio.timeout(SECONDS):
                assert (await node.end(run_id)).state is RunState.CANCELLED
            assert not agent.tasks[0].done()
            assert (await node.coordinator.run("s", Prompt("x"))).text == "next"
            assert observer.fenced_off == [run_id]
    assert [line for line in logged if "fenced off" in line["event"]]
    # The shutdown stops what is left.
    assert agent.tasks[0].cancelled()


async def test_r09_a_run_that_timed_out_keeps_its_session_until_its_tasks_have_ended(
    store: Store,
) -> None:
    agent = Starter()
    async with running(store, agent=agent) as node:
        run_id = await cancelled_at_work(node, agent, timeout=50_000)
        await asyncio.sleep(0.2)
        assert await node.coordinator.is_session_busy("s")
        agent.released.set()
        assert (await node.end(run_id)).error is not None


async def test_a_task_that_outlives_a_completed_run_does_not_keep_its_session(
    store: Store,
) -> None:
    agent = Starter()
    async with running(store, agent=agent) as node:
        leaving: list[asyncio.Task[None]] = []

        async def leave(turn: Turn) -> AsyncGenerator[AgentEvent, None]:
            leaving.append(asyncio.create_task(agent.released.wait()))  # type: ignore[arg-type]
            yield TextDelta("left")

        agent.run = leave  # type: ignore[method-assign]
        async with asyncio.timeout(SECONDS):
            assert (await node.coordinator.run("s", Prompt("x"))).text == "left"
            assert (await node.coordinator.run("s", Prompt("x"))).text == "left"
        assert not leaving[0].done()
        agent.released.set()
        await asyncio.gather(*leaving)


@pytest.mark.stores("sqlite")
async def test_tasks_of_the_engine_are_no_code_of_an_agent(store: Store) -> None:
    """A fold runs in tasks of the engine that the agent's code starts. They commit for others too,
    so they must not count as the work of this run."""
    seen: set[str] = set()

    async def watch() -> None:
        while True:
            coroutines = [task.get_coro() for task in asyncio.all_tasks()]
            seen.update(str(it) for it in coroutines if hasattr(it, "code"))
            await asyncio.sleep(0)

    async def fold(turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        yield TextDelta("step")
        if turn.prompt.text == "first":
            await folds.wait()
            watching = asyncio.create_task(watch())
            yield TextDelta((await turn.take_folded())[0].prompt.text)
            watching.cancel()

    folds, agent = asyncio.Event(), Starter()
    agent.run = fold  # type: ignore[method-assign]
    async with running(store, agent=agent) as node:
        first = await node.accept("s", "first")
        await node.fold("s", "folded")
        folds.set()
        assert (await node.end(first.run.run_id)).text == "folded"
    # After a read of the agent, the pool of PostgreSQL takes its connection back in a task.
    ours = [it for it in seen if "PoolConnectionHolder" not in it]
    assert len(ours) == 1, "the task that the agent started"
