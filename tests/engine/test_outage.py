"""An outage of the database that lasts longer than the lease of its nodes."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from runlane_server.cluster.membership import STORE_AWAY
from runlane_server.core.limits import Limits
from runlane_server.core.model import RunState
from runlane_server.engine.executor import NodeSettings
from support.node import Node, running
from support.postgres import OwnPostgres, fresh_database, own_postgres, postgres_store
from support.staging import SECONDS

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


async def until_silent(node: Node, leases: float) -> None:
    """Waits until a node has been without its lease for that many of them."""
    membership = node.coordinator.membership
    assert membership is not None
    async with asyncio.timeout(SECONDS):
        while membership.heartbeat_age < leases * LEASE:
            await asyncio.sleep(0.01)


async def until_alone(node: Node, *, alone: bool) -> None:
    """Waits until a heartbeat of the node has counted the others."""
    cluster = node.store.cluster
    assert cluster is not None
    cluster.is_alone = not alone
    async with asyncio.timeout(SECONDS):
        while cluster.is_alone is not alone:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["stopped", "crashed"])
async def test_agents_of_the_only_node_go_on_through_an_outage(
    database: OwnPostgres, how: signal.Signals
) -> None:
    async with fresh_database(database.url) as url, a_node(url) as node:
        run = await node.start_blocked("s", "g", max_attempts=1)
        await until_alone(node, alone=True)
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


async def test_r07_agents_of_one_of_many_nodes_stop_and_their_runs_say_why(
    database: OwnPostgres,
) -> None:
    async with fresh_database(database.url) as url, a_node(url) as node, a_node(url) as other:
        membership = node.coordinator.membership
        assert membership is not None
        ended = await node.start_blocked("s", "g", max_attempts=1)
        retried = await node.start_blocked("t", "h", max_attempts=2)
        await until_alone(node, alone=False)
        await asyncio.to_thread(database.stop)
        async with asyncio.timeout(SECONDS):
            while membership.heartbeat_age != float("inf"):
                await asyncio.sleep(0.01)
        await asyncio.to_thread(database.start)
        end = await other.end(ended.run_id)
        assert end.error is not None
        assert (end.error.reason, end.error.message) == ("INTERRUPTED", STORE_AWAY)
        for each in (node, other):
            each.latches.open("h")
        assert (await other.end(retried.run_id)).attempt == 2
