"""Several nodes over one store: any of them takes any command, and one executes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest

from runlane_server.agents.base import AgentEvent, Turn
from runlane_server.core.errors import StoreUnavailable
from runlane_server.core.limits import Limits
from runlane_server.core.model import FinishReason, RunState, SessionKey, TextDelta, WhenBusy
from runlane_server.core.transition import Transition
from runlane_server.engine.executor import NodeSettings
from runlane_server.store.postgres.cluster import PostgresCluster
from runlane_server.store.postgres.store import PostgresStore
from support.node import Node, running
from support.postgres import plain
from support.staging import SECONDS, say, script, wait

S = RunState

LONG = NodeSettings(lease=60.0)
"""Nobody is taken for lost where that is not what is tested."""

SHORT = NodeSettings(lease=2.0)


@asynccontextmanager
async def a_node(
    url: str, settings: NodeSettings = LONG, *, max_active: int = 256
) -> AsyncIterator[Node]:
    limits = Limits(cancel_grace=SECONDS, max_active_runs=max_active)
    async with (
        PostgresStore(url) as store,
        running(store, limits=limits, node=settings) as node,
    ):
        yield node


@asynccontextmanager
async def two(url: str, *, max_active: int = 256) -> AsyncIterator[tuple[Node, Node]]:
    async with a_node(url) as a, a_node(url, max_active=max_active) as b:
        yield a, b


@contextmanager
def cut_off(node: Node) -> Iterator[None]:
    """A node that cannot say that it is alive; all else it can."""
    cluster = node.store.cluster
    assert isinstance(cluster, PostgresCluster)

    async def away(node_id: str, lease: float) -> bool:
        raise StoreUnavailable("away")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "beat", away)
        yield


async def test_a_node_that_is_not_heard_for_a_while_keeps_its_runs(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first sign of life gets no answer; the next ones come soon enough."""
    beat = PostgresCluster.beat
    heard = asyncio.Event()
    loop = asyncio.get_running_loop()
    silent_until = loop.time() + SHORT.lease / 2

    async def slow(self: PostgresCluster, node_id: str, lease: float) -> bool:
        if loop.time() < silent_until:
            await asyncio.Event().wait()
        alive = await beat(self, node_id, lease)
        heard.set()
        return alive

    monkeypatch.setattr(PostgresCluster, "beat", slow)
    async with a_node(postgres_url, SHORT) as node:
        run = await node.blocked("s", "g")
        assert node.coordinator.membership is not None
        name = node.coordinator.membership.node_id
        await heard.wait()
        assert node.coordinator.membership.node_id == name
        node.gates.open("g")
        end = await node.end(run.run_id)
        assert (end.state, end.attempt) == (S.COMPLETED, 1)


async def test_r21_whoever_subscribes_anywhere_hears_of_the_end(postgres_url: str) -> None:
    async with two(postgres_url) as (a, b):
        run = await a.queue("s", "hello")
        assert (await b.end(run.run_id)).text == "hello"


async def test_r07_a_session_has_one_active_run_wherever_its_prompts_come_in(
    postgres_url: str,
) -> None:
    async with two(postgres_url) as (a, b):
        first = await a.blocked("s", "g")
        second = await b.queue("s", "x")
        third = await a.queue("s", "y")
        assert [await b.state(run.run_id) for run in (first, second, third)] == [
            S.ACTIVE,
            S.QUEUED,
            S.QUEUED,
        ]
        a.gates.open("g")
        ends = [await b.end(run.run_id) for run in (first, second, third)]
        assert [end.state for end in ends] == [S.COMPLETED] * 3
        assert [end.accept_seq for end in ends] == [1, 2, 3]
        assert ends[0].ended_at <= ends[1].ended_at <= ends[2].ended_at


async def test_r10_a_cancel_by_another_node_stops_the_agent(postgres_url: str) -> None:
    async with two(postgres_url) as (a, b):
        run = await a.blocked("s", "g")
        waiting = await a.queue("s", "x")
        receipt = await b.coordinator.cancel("s", reason="enough")
        assert [it.run_id for it in receipt.cancelled] == [run.run_id, waiting.run_id]
        end = await a.end(run.run_id)
        assert (end.state, end.cancel_reason) == (S.CANCELLED, "enough")
        assert (await b.end(waiting.run_id)).state is S.CANCELLED


async def test_r20_a_receipt_names_what_another_node_has_accepted(postgres_url: str) -> None:
    """The lane at hand is out of date, and what it says changes nothing: it is read again."""
    async with two(postgres_url, max_active=0) as (a, b):
        await a.end((await a.queue("s", "x")).run_id)
        run = await b.accept("s", script(wait("g")))
        await a.gates.reached("g")
        receipt = await b.coordinator.cancel("s")
        assert [it.run_id for it in receipt.cancelled] == [run.run.run_id]


async def test_r12_an_idle_node_knows_what_runs_elsewhere(postgres_url: str) -> None:
    async with two(postgres_url) as (a, b):
        # The lane is at hand on both.
        await a.end((await a.queue("s", "x")).run_id)
        await b.end((await b.queue("s", "y")).run_id)
        run = await a.blocked("s", "g")
        assert await b.coordinator.is_session_busy("s")
        receipt = await b.coordinator.cancel("s")
        assert [it.run_id for it in receipt.cancelled] == [run.run_id]
        assert (await b.end(run.run_id)).state is S.CANCELLED


async def test_a_node_with_a_free_slot_takes_what_waits_for_one(postgres_url: str) -> None:
    async with a_node(postgres_url, max_active=1) as full:
        await full.blocked("first", "g")
        runs = [await full.queue(f"s{n}", str(n)) for n in range(5)]
        async with a_node(postgres_url) as free:
            ends = [await free.end(run.run_id) for run in runs]
            assert [end.text for end in ends] == list("01234")
        full.gates.open("g")


async def test_r26_a_prompt_is_folded_in_whichever_node_took_it(postgres_url: str) -> None:
    async with two(postgres_url) as (a, b):
        host = await a.accept("s", script(wait("g"), {"step": True}, say("done")))
        await a.gates.reached("g")
        joins = await b.accept("s", "me too", when_busy=WhenBusy.FOLD)
        a.gates.open("g")
        assert (await b.end(joins.run.run_id)).folded_into == host.run.run_id


async def test_r17_what_a_node_gives_up_another_one_goes_on_with(postgres_url: str) -> None:
    async with a_node(postgres_url) as b:
        async with a_node(postgres_url) as a:
            run = await a.blocked("s", "g", max_attempts=2)
            b.gates.open("g")
        end = await b.end(run.run_id)
        assert (end.state, end.attempt) == (S.COMPLETED, 2)


async def test_a_node_that_falls_silent_loses_its_runs_and_notices(postgres_url: str) -> None:
    async with a_node(postgres_url, SHORT) as b, a_node(postgres_url, SHORT) as a:
        retried = await a.blocked("s", "g", max_attempts=2)
        ended = await a.blocked("t", "h")
        membership = a.coordinator.membership
        assert membership is not None
        b.gates.open("g")
        with cut_off(a):
            end = await b.end(retried.run_id)
            assert (end.state, end.attempt) == (S.COMPLETED, 2)
            interrupted = await b.end(ended.run_id)
            assert interrupted.error is not None
            assert interrupted.error.reason == "INTERRUPTED"
            assert not membership.alive
        assert (await a.end((await a.queue("u", "x")).run_id)).state is S.COMPLETED
        assert len(await a.completes()) == 3


class Stoppable:
    """An agent that works until it is stopped, and tells both."""

    def __init__(self) -> None:
        self.at_work = asyncio.Event()
        self.stopped = asyncio.Event()

    async def start(self) -> None:
        pass

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        self.at_work.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped.set()
        yield TextDelta(turn.run_id)

    async def close(self) -> None:
        pass


async def test_r07_a_node_that_gets_no_answer_stops_its_agents_within_its_lease(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its runs are another node's after that."""
    agent = Stoppable()
    async with (
        PostgresStore(postgres_url) as store,
        running(store, agent=agent, node=SHORT) as node,
    ):
        await node.queue("s", "x")
        await agent.at_work.wait()
        silence = asyncio.Event()

        async def silent(node_id: str, lease: float) -> bool:
            await silence.wait()
            return True

        monkeypatch.setattr(store.cluster, "beat", silent)
        async with asyncio.timeout(SHORT.lease):
            await agent.stopped.wait()
        silence.set()


class Late(PostgresStore):
    """Carries a commit out, and answers later."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.committed = asyncio.Event()
        self.answering = asyncio.Event()

    async def commit(self, base_version: int, transition: Transition) -> int:
        version = await super().commit(base_version, transition)
        self.committed.set()
        await self.answering.wait()
        return version


async def test_r07_a_node_that_is_lost_starts_no_agent_for_a_start_that_is_confirmed_too_late(
    postgres_url: str,
) -> None:
    agent = Stoppable()
    async with Late(postgres_url) as store, running(store, agent=agent, node=SHORT) as node:
        accepting = asyncio.create_task(node.queue("s", "x"))
        await store.committed.wait()
        membership = node.coordinator.membership
        assert membership is not None
        with cut_off(node):
            async with asyncio.timeout(SECONDS):
                while membership.alive:
                    await asyncio.sleep(0.01)
            store.answering.set()
            end = await node.end((await accepting).run_id)
        assert (end.state, end.finish_reason) == (S.FAILED, FinishReason.INTERRUPTED)
        assert not agent.at_work.is_set()


async def test_r07_nor_does_one_that_has_joined_anew_by_then(postgres_url: str) -> None:
    agent = Stoppable()
    async with Late(postgres_url) as store, running(store, agent=agent, node=SHORT) as node:
        accepting = asyncio.create_task(node.queue("s", "x"))
        await store.committed.wait()
        membership = node.coordinator.membership
        assert membership is not None
        before = membership.node_id
        # Its name is gone.
        await store.cluster.leave(before)
        async with asyncio.timeout(SECONDS):
            while membership.node_id == before:
                await asyncio.sleep(0.01)
        store.answering.set()
        end = await node.end((await accepting).run_id)
        assert (end.state, end.finish_reason) == (S.FAILED, FinishReason.INTERRUPTED)
        assert not agent.at_work.is_set()


async def test_a_node_that_was_taken_for_lost_joins_anew(postgres_url: str) -> None:
    async with a_node(postgres_url, SHORT) as b, a_node(postgres_url, SHORT) as a:
        run = await a.blocked("s", "g", max_attempts=2)
        judge, judged = b.coordinator.membership, a.coordinator.membership
        assert judge is not None
        assert judged is not None
        assert b.store.cluster is not None
        before = judged.node_id
        beside = await plain(postgres_url)
        async with asyncio.timeout(SECONDS):
            # Whoever was silent for no time at all; one that beats at that instant is passed over.
            while not await beside.fetchval("SELECT lost FROM nodes WHERE node_id = $1", before):
                await b.store.cluster.beat(judge.node_id, 0.0)
            while judged.node_id == before:
                await asyncio.sleep(0.01)
        a.gates.open("g")
        b.gates.open("g")
        end = await b.end(run.run_id)
        assert (end.state, end.attempt) == (S.COMPLETED, 2)
        assert judged.alive
        await beside.close()


async def test_what_waits_is_counted_over_all_nodes(postgres_url: str) -> None:
    async with two(postgres_url, max_active=0) as (a, b):
        await a.blocked("s", "g")
        for _ in range(3):
            await b.queue("s", "x")
        key = SessionKey("default", "s")
        assert len((await a.store.load_lane(key)).waiting) == 3
        a.gates.open("g")
        for run in (await a.store.list_runs("default", limit=10)).items:
            await b.end(run.run_id)
        assert (await b.store.load_lane(key)).waiting == ()


class Unanswered(PostgresStore):
    """Carries a commit out, and loses the answer: as often as it is told to."""

    to_lose = 0

    async def commit(self, base_version: int, transition: Transition) -> int:
        version = await super().commit(base_version, transition)
        if self.to_lose:
            self.to_lose -= 1
            raise StoreUnavailable("outcome unknown")
        return version


async def test_r01_a_run_whose_start_was_not_confirmed_runs_all_the_same(postgres_url: str) -> None:
    async with Unanswered(postgres_url) as store, running(store, node=LONG) as node:
        store.to_lose = 1
        # It is looked up, and found.
        run = await node.queue("s", "hello")
        assert (await node.end(run.run_id)).text == "hello"
        assert (await node.end((await node.queue("s", "next")).run_id)).text == "next"
