"""Several nodes on one store: any node takes any command, one node executes a run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from runlane_server.agents.base import AgentEvent, Turn
from runlane_server.core.errors import CorruptRecord, StoreUnavailable
from runlane_server.core.limits import Limits
from runlane_server.core.model import FinishReason, RunState, SessionKey, TextDelta, WhenBusy
from runlane_server.core.transition import Transition
from runlane_server.core.update import Move, Place, RunPatch
from runlane_server.engine.executor import NodeSettings
from runlane_server.store.postgres.cluster import PostgresCluster
from runlane_server.store.postgres.database import Database
from runlane_server.store.postgres.store import PostgresStore
from support.node import Node, running
from support.postgres import plain, postgres_store
from support.staging import SECONDS, say, script, wait

S = RunState

LONG = NodeSettings(lease=60.0)
"""A lease that never ends during a test, unless the test is about that."""

SHORT = NodeSettings(lease=2.0)


@asynccontextmanager
async def a_node(
    url: str, settings: NodeSettings = LONG, *, max_active: int = 256
) -> AsyncIterator[Node]:
    limits = Limits(cancel_grace=SECONDS, max_active_runs=max_active)
    async with (
        postgres_store(url) as store,
        running(store, limits=limits, node=settings) as node,
    ):
        yield node


@asynccontextmanager
async def two(url: str, *, max_active: int = 256) -> AsyncIterator[tuple[Node, Node]]:
    async with a_node(url) as a, a_node(url, max_active=max_active) as b:
        yield a, b


@contextmanager
def cut_off(node: Node) -> Iterator[None]:
    """A cluster whose heartbeats fail while everything else works."""
    cluster = node.store.cluster
    assert isinstance(cluster, PostgresCluster)

    async def away(node_id: str, lease: float) -> bool:
        raise StoreUnavailable("away")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "heartbeat", away)
        yield


async def test_a_node_keeps_its_runs_if_one_heartbeat_is_lost(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first heartbeat gets no answer; the retries succeed within the lease."""
    beat = PostgresCluster.heartbeat
    heard = asyncio.Event()
    loop = asyncio.get_running_loop()
    silent_until = loop.time() + SHORT.lease / 2

    async def slow(self: PostgresCluster, node_id: str, lease: float) -> bool:
        if loop.time() < silent_until:
            await asyncio.Event().wait()
        alive = await beat(self, node_id, lease)
        heard.set()
        return alive

    monkeypatch.setattr(PostgresCluster, "heartbeat", slow)
    async with a_node(postgres_url, SHORT) as node:
        run = await node.start_blocked("s", "g")
        assert node.coordinator.membership is not None
        name = node.coordinator.membership.node_id
        await heard.wait()
        assert node.coordinator.membership.node_id == name
        node.latches.open("g")
        end = await node.end(run.run_id)
        assert (end.state, end.attempt) == (S.COMPLETED, 1)


async def test_r21_a_subscriber_on_any_node_receives_run_complete(postgres_url: str) -> None:
    async with two(postgres_url) as (a, b):
        run = await a.queue("s", "hello")
        assert (await b.end(run.run_id)).text == "hello"


async def test_r07_a_session_has_one_active_run_across_all_nodes(
    postgres_url: str,
) -> None:
    async with two(postgres_url) as (a, b):
        first = await a.start_blocked("s", "g")
        second = await b.queue("s", "x")
        third = await a.queue("s", "y")
        assert [await b.state(run.run_id) for run in (first, second, third)] == [
            S.ACTIVE,
            S.QUEUED,
            S.QUEUED,
        ]
        a.latches.open("g")
        ends = [await b.end(run.run_id) for run in (first, second, third)]
        assert [end.state for end in ends] == [S.COMPLETED] * 3
        assert [end.accept_seq for end in ends] == [1, 2, 3]
        assert ends[0].ended_at <= ends[1].ended_at <= ends[2].ended_at


async def test_r10_a_cancel_sent_to_another_node_stops_the_agent(postgres_url: str) -> None:
    async with two(postgres_url) as (a, b):
        run = await a.start_blocked("s", "g")
        waiting = await a.queue("s", "x")
        receipt = await b.coordinator.cancel("s", reason="enough")
        assert [it.run_id for it in receipt.cancelled] == [run.run_id, waiting.run_id]
        end = await a.end(run.run_id)
        assert (end.state, end.cancel_reason) == (S.CANCELLED, "enough")
        assert (await b.end(waiting.run_id)).state is S.CANCELLED


async def test_r20_a_receipt_lists_runs_that_another_node_accepted(postgres_url: str) -> None:
    """The cached lane is outdated and the cancel writes nothing: the lane is loaded again."""
    async with two(postgres_url, max_active=0) as (a, b):
        await a.end((await a.queue("s", "x")).run_id)
        run = await b.accept("s", script(wait("g")))
        await a.latches.reached("g")
        receipt = await b.coordinator.cancel("s")
        assert [it.run_id for it in receipt.cancelled] == [run.run.run_id]


async def test_r12_an_idle_node_sees_that_a_run_is_active_on_another_node(
    postgres_url: str,
) -> None:
    async with two(postgres_url) as (a, b):
        # Both nodes have cached the lane.
        await a.end((await a.queue("s", "x")).run_id)
        await b.end((await b.queue("s", "y")).run_id)
        run = await a.start_blocked("s", "g")
        assert await b.coordinator.is_session_busy("s")
        receipt = await b.coordinator.cancel("s")
        assert [it.run_id for it in receipt.cancelled] == [run.run_id]
        assert (await b.end(run.run_id)).state is S.CANCELLED


async def test_a_node_with_a_free_slot_claims_a_run_waiting_on_another_node(
    postgres_url: str,
) -> None:
    async with a_node(postgres_url, max_active=1) as full:
        await full.start_blocked("first", "g")
        runs = [await full.queue(f"s{n}", str(n)) for n in range(5)]
        async with a_node(postgres_url) as free:
            ends = [await free.end(run.run_id) for run in runs]
            assert [end.text for end in ends] == list("01234")
        full.latches.open("g")


async def test_r26_a_fold_run_accepted_by_another_node_is_folded(postgres_url: str) -> None:
    async with two(postgres_url) as (a, b):
        host = await a.accept("s", script(wait("g"), {"step": True}, say("done")))
        await a.latches.reached("g")
        joins = await b.accept("s", "me too", when_busy=WhenBusy.FOLD)
        a.latches.open("g")
        assert (await b.end(joins.run.run_id)).folded_into == host.run.run_id


async def test_r25_a_lane_that_changes_during_a_write_leaves_no_gap_in_the_events(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lane that is loaded then counts output whose write is not confirmed yet."""
    async with two(postgres_url) as (a, b):
        written, may_confirm = asyncio.Event(), asyncio.Event()
        append = a.store.append

        async def slow(*what: Any, **more: Any) -> None:
            await append(*what, **more)
            written.set()
            await may_confirm.wait()

        monkeypatch.setattr(a.store, "append", slow)
        accepted = await a.accept("s", script(say("one"), wait("g"), say("two")))
        async with asyncio.timeout(SECONDS):
            await written.wait()
        await b.queue("s", "x")
        last = await a.queue("s", "y")
        may_confirm.set()
        a.latches.open("g")
        await a.end(last.run_id)
        events = await b.events(accepted.run.run_id)
        assert [event.index for event in events] == list(range(1, len(events) + 1))
        assert [e.body.text for e in events if isinstance(e.body, TextDelta)] == ["one", "two"]


async def test_r17_another_node_continues_the_runs_of_a_stopping_node(postgres_url: str) -> None:
    async with a_node(postgres_url) as b:
        async with a_node(postgres_url) as a:
            run = await a.start_blocked("s", "g", max_attempts=2)
            b.latches.open("g")
        end = await b.end(run.run_id)
        assert (end.state, end.attempt) == (S.COMPLETED, 2)


async def test_a_node_whose_lease_ends_loses_its_runs_and_stops_its_agents(
    postgres_url: str,
) -> None:
    async with a_node(postgres_url, SHORT) as b, a_node(postgres_url, SHORT) as a:
        retried = await a.start_blocked("s", "g", max_attempts=2)
        ended = await a.start_blocked("t", "h")
        membership = a.coordinator.membership
        assert membership is not None
        b.latches.open("g")
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
    """An agent that works until it is stopped, and signals its start and its stop."""

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


async def test_r07_a_node_without_answer_from_the_store_stops_its_agents_within_its_lease(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the lease its runs belong to another node."""
    agent = Stoppable()
    async with (
        postgres_store(postgres_url) as store,
        running(store, agent=agent, node=SHORT) as node,
    ):
        await node.queue("s", "x")
        await agent.at_work.wait()
        silence = asyncio.Event()

        async def silent(node_id: str, lease: float) -> bool:
            await silence.wait()
            return True

        monkeypatch.setattr(store.cluster, "heartbeat", silent)
        async with asyncio.timeout(SHORT.lease):
            await agent.stopped.wait()
        silence.set()


class Late(PostgresStore):
    """A store that commits at once and confirms later."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.committed = asyncio.Event()
        self.answering = asyncio.Event()

    async def commit(self, base_version: int, transition: Transition) -> int:
        version = await super().commit(base_version, transition)
        self.committed.set()
        await self.answering.wait()
        return version


async def test_r07_a_node_declared_dead_starts_no_agent_after_a_late_confirmation(
    postgres_url: str,
) -> None:
    agent = Stoppable()
    async with (
        Late(Database.parse(postgres_url)) as store,
        running(store, agent=agent, node=SHORT) as node,
    ):
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


async def test_r07_a_node_that_rejoined_starts_no_agent_after_a_late_confirmation(
    postgres_url: str,
) -> None:
    agent = Stoppable()
    async with (
        Late(Database.parse(postgres_url)) as store,
        running(store, agent=agent, node=SHORT) as node,
    ):
        accepting = asyncio.create_task(node.queue("s", "x"))
        await store.committed.wait()
        membership = node.coordinator.membership
        assert membership is not None
        before = membership.node_id
        # Its id is gone.
        await store.cluster.leave(before)
        async with asyncio.timeout(SECONDS):
            while membership.node_id == before:
                await asyncio.sleep(0.01)
        store.answering.set()
        end = await node.end((await accepting).run_id)
        assert (end.state, end.finish_reason) == (S.FAILED, FinishReason.INTERRUPTED)
        assert not agent.at_work.is_set()


async def test_a_node_declared_dead_rejoins_under_a_new_id(postgres_url: str) -> None:
    async with a_node(postgres_url, SHORT) as b, a_node(postgres_url, SHORT) as a:
        run = await a.start_blocked("s", "g", max_attempts=2)
        judge, judged = b.coordinator.membership, a.coordinator.membership
        assert judge is not None
        assert judged is not None
        assert b.store.cluster is not None
        before = judged.node_id
        beside = await plain(postgres_url)
        async with asyncio.timeout(SECONDS):
            # With a lease of zero every node is dead unless its heartbeat arrives at this instant.
            while not await beside.fetchval("SELECT lost FROM nodes WHERE node_id = $1", before):
                await b.store.cluster.heartbeat(judge.node_id, 0.0)
            while judged.node_id == before:
                await asyncio.sleep(0.01)
        a.latches.open("g")
        b.latches.open("g")
        end = await b.end(run.run_id)
        assert (end.state, end.attempt) == (S.COMPLETED, 2)
        assert judged.alive
        await beside.close()


async def test_r09_a_node_that_is_back_in_time_keeps_its_runs_until_their_agents_return(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    beat = PostgresCluster.heartbeat
    heard = asyncio.Semaphore(0)

    async def counted(self: PostgresCluster, node_id: str, lease: float) -> bool:
        known = await beat(self, node_id, lease)
        heard.release()
        return known

    async with a_node(postgres_url, SHORT) as node:
        prompt = script(wait("g", ignore_cancel=True))
        run = (await node.accept("s", prompt, max_attempts=2)).run
        await node.latches.reached("g")
        membership = node.coordinator.membership
        assert membership is not None
        before = membership.node_id
        with cut_off(node):
            async with asyncio.timeout(SECONDS):
                while membership.holds_runs:
                    await asyncio.sleep(0.01)
        monkeypatch.setattr(PostgresCluster, "heartbeat", counted)
        async with asyncio.timeout(SECONDS):
            for _ in range(3):
                await heard.acquire()
        assert (await node.coordinator.get_run(run.run_id)).attempt == 1
        assert membership.node_id == before
        node.latches.open("g")
        end = await node.end(run.run_id)
        assert (end.state, end.attempt) == (S.COMPLETED, 2)
        assert membership.node_id != before


async def test_waiting_runs_are_counted_over_all_nodes(postgres_url: str) -> None:
    async with two(postgres_url, max_active=0) as (a, b):
        await a.start_blocked("s", "g")
        for _ in range(3):
            await b.queue("s", "x")
        key = SessionKey("default", "s")
        assert len((await a.store.load_lane(key)).waiting) == 3
        a.latches.open("g")
        for run in (await a.store.list_runs("default", limit=10)).items:
            await b.end(run.run_id)
        assert (await b.store.load_lane(key)).waiting == ()


class Unanswered(PostgresStore):
    """A store that commits and loses the confirmation, a given number of times."""

    to_lose = 0

    async def commit(self, base_version: int, transition: Transition) -> int:
        version = await super().commit(base_version, transition)
        if self.to_lose:
            self.to_lose -= 1
            raise StoreUnavailable("outcome unknown")
        return version


async def test_r01_a_run_whose_start_was_not_confirmed_is_executed(postgres_url: str) -> None:
    async with Unanswered(Database.parse(postgres_url)) as store, running(store, node=LONG) as node:
        store.to_lose = 1
        # The lookup finds it.
        run = await node.queue("s", "hello")
        assert (await node.end(run.run_id)).text == "hello"
        assert (await node.end((await node.queue("s", "next")).run_id)).text == "next"


async def test_r21_a_damaged_lane_does_not_keep_nodes_from_recovering_other_runs(
    postgres_url: str,
) -> None:
    async with a_node(postgres_url, SHORT) as b:
        async with a_node(postgres_url, SHORT) as a:
            await a.start_blocked("bad", "g", run_id="bad", max_attempts=2)
            await a.queue("bad", "later", run_id="behind")
            await a.start_blocked("good", "h", run_id="good", max_attempts=2)
            beside = await plain(postgres_url)
            changed = "UPDATE runs SET when_busy = 'never' WHERE session_id = 'bad'"
            assert await beside.execute(changed) == "UPDATE 2"
            await beside.close()
            with cut_off(a):
                await b.latches.reached("h")
                b.latches.open("h")
                assert (await b.end("good")).state is S.COMPLETED
            with pytest.raises(CorruptRecord, match="bad"):
                await b.queue("bad", "more")
            await b.coordinator.sessions.delete("bad")
            ends = [it for it in await b.completes() if it.session_id == "bad"]
            assert sorted(it.run_id for it in ends) == ["bad", "behind"]
            assert {it.error and it.error.reason for it in ends} == {"CORRUPT_RECORD"}
        assert (await b.end((await b.queue("bad", "x")).run_id)).state is S.COMPLETED


class Refusing(PostgresStore):
    """A store that cannot write what becomes of the run of the session `a`."""

    async def commit(self, base_version: int, transition: Transition) -> int:
        if transition.lane.key.session_id == "a":
            raise ValueError("cannot be written")
        return await super().commit(base_version, transition)


async def test_r21_a_lost_run_that_cannot_be_written_keeps_no_other_lost(postgres_url: str) -> None:
    async with (
        a_node(postgres_url, SHORT) as lost,
        Refusing(Database.parse(postgres_url)) as store,
        running(store, node=SHORT) as node,
    ):
        for name in ("a", "b"):
            prompt = script(wait(name, ignore_cancel=True))
            await lost.accept(name, prompt, max_attempts=2)
            await lost.latches.reached(name)
        with cut_off(lost):
            # The lost node gives its agents more time than that before it hands their runs over.
            async with asyncio.timeout(SECONDS / 2):
                await node.latches.reached("b")
            node.latches.open("b")
            for name in ("a", "b"):
                lost.latches.open(name)


async def test_r46_a_run_that_another_node_has_edited_and_moved_starts_so(
    postgres_url: str,
) -> None:
    async with two(postgres_url) as (a, b):
        await a.start_blocked("s", "l", run_id="first")
        for run_id in ("second", "third"):
            await a.queue("s", run_id, run_id=run_id)
        # The first node has cached these prompts.
        edits = b.coordinator.updates
        moved = RunPatch(text=script(say("edited")), move=Move(Place.FIRST))
        await edits.update("default", "third", moved)
        a.latches.open("l")
        assert (await a.end("third")).text == "edited"
        await a.end("second")
        ended = [complete.run_id for complete in await a.completes()]
        assert ended == ["first", "third", "second"]
