"""An outage of the database that lasts longer than the lease of its nodes."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest

from runlane_server.cluster.membership import STORE_AWAY, Membership
from runlane_server.core.errors import StoreDown, StoreUnavailable
from runlane_server.core.limits import Limits
from runlane_server.core.model import RunState
from runlane_server.core.transition import Transition
from runlane_server.engine.executor import NodeSettings
from runlane_server.store.postgres.database import Database
from runlane_server.store.postgres.store import PostgresStore
from support.node import Node, running
from support.postgres import OwnPostgres, fresh_database, own_postgres, postgres_store
from support.staging import SECONDS, say, script, wait

LEASE = 1.0


@pytest.fixture(scope="module")
def database() -> Iterator[OwnPostgres]:
    """A server that no other test uses, as it is stopped."""
    with own_postgres() as server:
        yield server


@asynccontextmanager
async def a_node(url: str) -> AsyncIterator[Node]:
    limits = Limits(cancel_grace=SECONDS)
    async with (
        postgres_store(url) as store,
        running(store, limits=limits, node=NodeSettings(lease=LEASE)) as node,
    ):
        yield node


def membership_of(node: Node) -> Membership:
    assert node.coordinator.membership is not None
    return node.coordinator.membership


def name_of(node: Node) -> str:
    return membership_of(node).node_id


async def until_silent(node: Node, leases: float) -> None:
    """Waits until a node has sent no heartbeat for that many leases."""
    membership = membership_of(node)
    async with asyncio.timeout(SECONDS):
        while membership.heartbeat_age < leases * LEASE:
            await asyncio.sleep(0.01)


@contextmanager
def refused(
    node: Node, monkeypatch: pytest.MonkeyPatch, error: type[StoreUnavailable] = StoreDown
) -> Iterator[None]:
    """The heartbeats of one node fail, while everything else works."""

    async def refuse(node_id: str, lease: float) -> bool:
        raise error("away")

    with monkeypatch.context() as patch:
        patch.setattr(node.store.cluster, "heartbeat", refuse)
        yield


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["stopped", "crashed"])
async def test_agents_of_the_only_node_go_on_through_an_outage(
    database: OwnPostgres, how: signal.Signals
) -> None:
    async with fresh_database(database.url) as url, a_node(url) as node:
        run = await node.start_blocked("s", "g", max_attempts=1)
        await asyncio.to_thread(database.stop, how)
        await until_silent(node, 3)
        await asyncio.to_thread(database.start)
        # A node that starts now does not take the run for lost either.
        async with a_node(url) as other:
            node.latches.open("g")
            end = await other.end(run.run_id)
        assert (end.state, end.attempt) == (RunState.COMPLETED, 1)
        assert (await node.end((await node.queue("t", "x")).run_id)).state is RunState.COMPLETED
        assert len(await node.completes()) == 2


async def test_r21_agents_of_all_nodes_go_on_through_an_outage(database: OwnPostgres) -> None:
    """Neither node takes the runs of the other for lost, and no output is lost or doubled."""
    async with fresh_database(database.url) as url, a_node(url) as node, a_node(url) as other:
        there = await other.start_blocked("s", "s", max_attempts=1)
        prompt = script(say("before "), wait("t"), say("during "), {"step": True}, say("after"))
        here = (await node.accept("t", prompt, max_attempts=1)).run
        await node.latches.reached("t")
        names = [name_of(each) for each in (node, other)]
        await asyncio.to_thread(database.stop)
        await until_silent(node, 1)
        node.latches.open("t")
        await until_silent(node, 3)
        assert not membership_of(node).alive
        await asyncio.to_thread(database.start)
        assert (await other.end(here.run_id)).text == "before during after"
        other.latches.open("s")
        for run in (here, there):
            end = await node.end(run.run_id)
            assert (end.state, end.attempt) == (RunState.COMPLETED, 1)
        indexes = [event.index for event in await other.events(here.run_id)]
        assert indexes == list(range(1, len(indexes) + 1))
        assert [name_of(each) for each in (node, other)] == names
        assert (await node.end((await node.queue("u", "x")).run_id)).state is RunState.COMPLETED


async def test_a_node_starts_no_run_until_its_lease_is_renewed(
    database: OwnPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its heartbeats are refused, so that it could start one."""
    async with fresh_database(database.url) as url, a_node(url) as node:
        first = await node.start_blocked("s", "g", max_attempts=1)
        with refused(node, monkeypatch):
            await until_silent(node, 1)
            second = await node.queue("s", "x")
            node.latches.open("g")
            assert (await node.end(first.run_id)).state is RunState.COMPLETED
            assert await node.state(second.run_id) in {RunState.ACCEPTED, RunState.QUEUED}
        assert (await node.end(second.run_id)).state is RunState.COMPLETED


async def test_r33_a_node_that_lost_its_lease_in_a_one_sided_outage_is_fenced_off(
    database: OwnPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database refuses the heartbeats of one node only, so the other takes over its run. What
    the first agent emits then has no effect, and it is stopped once that is known."""
    async with fresh_database(database.url) as url, a_node(url) as node, a_node(url) as other:
        prompt = script(wait("g"), say("whole"))
        run = (await node.accept("s", prompt, max_attempts=2)).run
        await node.latches.reached("g")
        with refused(node, monkeypatch):
            await other.latches.reached("g")
            assert node.coordinator.load.active == 1
            node.latches.open("g")
            async with asyncio.timeout(SECONDS):
                while node.coordinator.load.active:
                    await asyncio.sleep(0.01)
            assert await other.state(run.run_id) is RunState.ACTIVE
        other.latches.open("g")
        end = await other.end(run.run_id)
        assert (end.state, end.attempt, end.text) == (RunState.COMPLETED, 2, "whole")
        assert await other.lines("s") == [f"user: {prompt}", "assistant: whole [stop]"]


async def test_r07_agents_stop_within_a_lease_after_the_database_refuses_no_longer(
    database: OwnPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that is silent may answer other nodes, which recover the runs of this one."""
    async with fresh_database(database.url) as url, a_node(url) as node:
        run = await node.start_blocked("s", "g", max_attempts=1)
        with refused(node, monkeypatch):
            await until_silent(node, 2)
            assert node.coordinator.load.active == 1
        with refused(node, monkeypatch, StoreUnavailable):
            async with asyncio.timeout(LEASE):
                while node.coordinator.load.active:
                    await asyncio.sleep(0.01)
            error = (await node.end(run.run_id)).error
            assert error is not None
            assert (error.reason, error.message) == ("INTERRUPTED", STORE_AWAY)


class Late(PostgresStore):
    """A store that loses the confirmation of its first commit on demand."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.committed, self.losing = asyncio.Event(), asyncio.Event()

    async def commit(self, base_version: int, transition: Transition) -> int:
        version = await super().commit(base_version, transition)
        if not self.losing.is_set():
            self.committed.set()
            await self.losing.wait()
            raise StoreUnavailable("outcome unknown")
        return version


async def test_a_start_that_an_outage_left_unconfirmed_takes_place_after_it(
    database: OwnPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node reads its own start before its first heartbeat after the outage."""
    async with (
        fresh_database(database.url) as url,
        Late(Database.parse(url)) as store,
        running(store, node=NodeSettings(lease=LEASE)) as node,
    ):
        accepting = asyncio.create_task(node.queue("s", "x", run_id="r", max_attempts=1))
        await store.committed.wait()
        with refused(node, monkeypatch):
            await until_silent(node, 1)
            store.losing.set()
            assert (await accepting).run_id == "r"
            assert await node.state("r") is RunState.ACTIVE
            assert not node.coordinator.load.active
        assert (await node.end("r")).state is RunState.COMPLETED
