"""A node that starts on what another left behind: a copy of its store, taken at some instant.

Such a copy is what a node finds that was killed at that instant.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TypeAlias

import pytest

from engine.copies import copy_of, execute
from engine.test_input import opened
from runlane_server.agents.base import Turn
from runlane_server.agents.functions import FunctionAgent, resumable
from runlane_server.agents.worker.agent import WorkerAgent
from runlane_server.agents.worker.workers import Workers
from runlane_server.core.limits import Limits
from runlane_server.core.model import FinishReason, RunKey, RunState, SessionKey, Started
from runlane_server.engine.agent_table import AgentTable, DeclaredAgent
from runlane_server.store.base import Store
from runlane_server.store.open import StoreUrl, open_store
from support.node import Node, running
from support.staging import SECONDS, STEP, say, script, wait

pytestmark = pytest.mark.stores("sqlite", "postgresql")

S = RunState

Second: TypeAlias = Callable[..., AbstractAsyncContextManager[Node]]


@pytest.fixture
async def first(store: Store) -> AsyncIterator[Node]:
    async with running(store) as node:
        yield node


@pytest.fixture
def second(store_url: str, tmp_path: Path) -> Second:
    """A node on a copy of everything that the first node has committed."""

    @asynccontextmanager
    async def started(limits: Limits | None = None) -> AsyncIterator[Node]:
        async with (
            copy_of(store_url, tmp_path) as url,
            open_store(StoreUrl.parse(url)) as store,
            running(store, limits=limits) as node,
        ):
            yield node

    return started


async def heard(node: Node, run_id: str, text: str) -> None:
    """Waits until the text of a run is in the store."""
    follower = node.feed.follow(RunKey("default", run_id), 0)
    said = ""
    while text not in said:
        for event in await follower.next():
            said += getattr(event.body, "text", "")
    follower.close()


Damage: TypeAlias = str
"""A statement that damages the stored events of the run `bad`."""

DAMAGES: tuple[Damage, ...] = (
    "UPDATE run_events SET body = 'no JSON' WHERE run_id = 'bad' AND kind = 'text_delta'",
    "UPDATE run_events SET body = NULL WHERE run_id = 'bad' AND kind = 'text_delta'",
    "UPDATE run_events SET body = '[1, 2, 3]' WHERE run_id = 'bad' AND kind = 'text_delta'",
    "UPDATE run_events SET kind = 'unknown' WHERE run_id = 'bad' AND kind = 'text_delta'",
    "DELETE FROM run_events WHERE run_id = 'bad' AND idx = 1",
)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("attempts", [1, 2])
async def test_r21_a_run_whose_events_are_damaged_is_recovered_and_the_others_too(
    first: Node, store_url: str, tmp_path: Path, damage: Damage, attempts: int
) -> None:
    for name in ("good", "bad", "fine"):
        prompt = script(say(f"by {name}"), wait(name))
        await first.accept(name, prompt, run_id=name, max_attempts=attempts)
        await first.latches.reached(name)
        await heard(first, name, f"by {name}")
    async with copy_of(store_url, tmp_path) as url:
        await execute(url, damage)
        async with open_store(StoreUrl.parse(url)) as store, running(store) as node:
            for name in ("good", "bad", "fine"):
                node.latches.open(name)
            ends = {name: await node.end(name) for name in ("good", "bad", "fine")}
            after = await node.end((await node.queue("bad", "next")).run_id)
    if attempts == 2:
        assert {name: end.text for name, end in ends.items()} == {n: f"by {n}" for n in ends}
        assert {(end.state, end.attempt) for end in ends.values()} == {(S.COMPLETED, 2)}
        return
    assert {end.finish_reason for end in ends.values()} == {FinishReason.INTERRUPTED}
    assert (ends["good"].text, ends["fine"].text) == ("by good", "by fine")
    assert ends["bad"].text in {"", "by bad"}
    assert after.state is S.COMPLETED


async def test_output_beyond_the_limit_of_the_new_node_is_cut(first: Node, second: Second) -> None:
    prompt = script(*(say("x" * 100) for _ in range(5)), {"wait": "a"}, say("y" * 50), wait("g"))
    run = (await first.accept("s", prompt)).run
    await first.latches.reached("a")
    await heard(first, run.run_id, "x" * 500)
    first.latches.open("a")
    await first.latches.reached("g")
    await heard(first, run.run_id, "x" * 500 + "y" * 50)
    async with second(Limits(max_run_output=520)) as node:
        complete = await node.end(run.run_id)
        assert (complete.finish_reason, complete.text) == (FinishReason.INTERRUPTED, "x" * 500)
        indices = [event.index for event in await node.events(run.run_id)]
        assert indices == list(range(1, len(indices) + 1))


async def test_waiting_runs_start_in_order_after_a_restart(first: Node, second: Second) -> None:
    active = await first.start_blocked("s", "g")
    queued = [await first.queue("s", str(n)) for n in range(3)]
    async with second() as node:
        await node.end(queued[-1].run_id)
        ended = [(c.run_id, c.state) for c in await node.completes()]
    assert ended == [
        (active.run_id, S.FAILED),
        *((run.run_id, S.COMPLETED) for run in queued),
    ]


async def test_r21_a_run_active_at_a_crash_ends_interrupted_and_keeps_its_text(
    first: Node, second: Second
) -> None:
    call = {"tool_call": {"id": "1", "name": "look"}}
    run = (await first.accept("s", script(say("so "), say("far"), call, wait("g")))).run
    await first.latches.reached("g")
    await heard(first, run.run_id, "so far")
    async with second() as node:
        complete = await node.end(run.run_id)
        assert complete.finish_reason is FinishReason.INTERRUPTED
        assert complete.error is not None
        assert (complete.error.reason, complete.text) == ("INTERRUPTED", "so far")
        history = await node.end((await node.accept("s", script({"say": "history"}))).run.run_id)
        assert "assistant: so far" in history.text
        indices = [event.index for event in await node.events(run.run_id)]
        assert indices == list(range(1, len(indices) + 1))


async def test_r07_a_run_with_an_attempt_left_is_retried_before_waiting_runs(
    first: Node, second: Second
) -> None:
    prompt = script({"say": "attempt"}, wait("g"))
    run = (await first.accept("s", prompt, max_attempts=2)).run
    await first.latches.reached("g")
    queued = await first.queue("s", "later")
    async with second() as node:
        await node.latches.reached("g")
        node.latches.open("g")
        await node.end(queued.run_id)
        ended = await node.completes()
        assert [c.run_id for c in ended] == [run.run_id, queued.run_id]
        assert (ended[0].text, ended[0].attempt, ended[0].state) == ("2", 2, S.COMPLETED)
        starts = [e.body for e in await node.events(run.run_id) if isinstance(e.body, Started)]
        assert starts == [Started(1), Started(2)]
        assert [m.role for m in await node.messages("s")] == ["user", "assistant"] * 2


async def parked(store: Store, session_id: str) -> None:
    """Waits until the active run waits for input without a node. Over PostgreSQL a node serves
    before it has recovered all runs."""
    async with asyncio.timeout(SECONDS):
        while True:
            active = (await store.load_lane(SessionKey("default", session_id))).active
            if active is not None and active.asking.parked:
                return
            await asyncio.sleep(0.01)


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize("can_resume", [False, True])
async def test_r44_a_run_that_waits_is_recovered_for_an_agent_that_workers_execute_now(
    store: Store, store_url: str, tmp_path: Path, *, can_resume: bool
) -> None:
    """The settings have changed meanwhile. No worker will return for it."""

    async def asks(turn: Turn) -> AsyncGenerator[str, None]:
        yield "before "
        yield await turn.ask("well?")

    before = FunctionAgent(resumable(asks) if can_resume else asks)
    async with running(store, agent=AgentTable([DeclaredAgent("a", before)])) as node:
        run = (await node.accept("s", "x")).run
        await opened(node, run.run_id)
        now = AgentTable([DeclaredAgent("a", WorkerAgent(Workers(), "a"))])
        async with (
            copy_of(store_url, tmp_path) as url,
            open_store(StoreUrl.parse(url)) as copied,
            running(copied, agent=now) as second,
        ):
            if can_resume:
                # It starts again once it is answered, which a cancel need not wait for.
                await parked(copied, "s")
                assert await second.state(run.run_id) is S.INPUT_REQUIRED
                await second.coordinator.cancel("s")
            end = await second.end(run.run_id)
            assert end.state is (S.CANCELLED if can_resume else S.FAILED)
            assert end.finish_reason is (
                FinishReason.CANCELED if can_resume else FinishReason.INTERRUPTED
            )
        await node.coordinator.cancel("s")


async def test_r19_a_confirmed_cancel_survives_a_crash(first: Node, second: Second) -> None:
    prompt = script(wait("g", ignore_cancel=True))
    run = (await first.accept("s", prompt, max_attempts=5)).run
    await first.latches.reached("g")
    await first.coordinator.cancel("s")
    async with second() as node:
        assert (await node.end(run.run_id)).state is S.CANCELLED
    first.latches.open("g")


async def test_r26_folded_runs_are_retried_with_the_run_they_joined(
    first: Node, second: Second
) -> None:
    prompt = script(wait("a"), STEP, wait("b"), say("end"))
    host = (await first.accept("s", prompt, max_attempts=2)).run
    await first.latches.reached("a")
    folded = await first.fold("s", "and this")
    first.latches.open("a")
    await first.latches.reached("b")
    assert await first.state(folded.run_id) is S.FOLDED
    async with second() as node:
        node.latches.open("a")
        node.latches.open("b")
        assert (await node.end(host.run_id)).text == "[folded: and this]end"
        assert (await node.end(folded.run_id)).folded_into == host.run_id
        assert [m.role for m in await node.messages("s")] == ["user", "user", "assistant"]


async def test_restored_runs_are_counted_and_covered_by_a_cancel(
    first: Node, second: Second
) -> None:
    active = await first.start_blocked("s", "g")
    queued = await first.queue("s", "x")
    async with second(limits=Limits(max_active_runs=0)) as node:
        # At the start, or as soon as its node is declared dead.
        assert (await node.end(active.run_id)).finish_reason is FinishReason.INTERRUPTED
        assert await node.coordinator.is_session_busy("s")
        assert node.coordinator.is_busy()
        receipts = await node.coordinator.cancel_all()
        assert [c.run_id for r in receipts for c in r.cancelled] == [queued.run_id]
        assert (await node.end(queued.run_id)).state is S.CANCELLED


async def test_wait_run_works_for_a_run_accepted_before_a_restart(
    first: Node, second: Second
) -> None:
    await first.start_blocked("s", "g")
    queued = await first.queue("s", "later")
    async with second() as node:
        run = await node.coordinator.wait_run(queued.run_id, timeout=SECONDS)
        assert run.state is S.COMPLETED
