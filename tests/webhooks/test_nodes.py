"""Two nodes over one database: one of them delivers for a webhook (R55)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from runlane_server.webhooks import dispatcher as dispatcher_module
from support.deliveries import Node, delivering
from support.endpoint import endpoint
from support.postgres import plain, postgres_store
from support.story import Story

pytest.importorskip("asyncpg")


@pytest.fixture
async def nodes(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Node, Node]]:
    monkeypatch.setattr(dispatcher_module, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(dispatcher_module, "POLL_SECONDS", 0.1)
    async with (
        postgres_store(postgres_url) as one,
        postgres_store(postgres_url) as two,
        delivering(one) as first,
        delivering(two) as second,
    ):
        yield first, second


async def leader_of(nodes: tuple[Node, Node]) -> tuple[Node, Node]:
    """The node that delivers, and the other one."""
    async with asyncio.timeout(10):
        while True:
            for node, other in (nodes, nodes[::-1]):
                if node.dispatcher.deliveries:
                    return node, other
            await asyncio.sleep(0.01)


async def test_r55_one_of_two_nodes_delivers(nodes: tuple[Node, Node]) -> None:
    async with endpoint() as served:
        await nodes[0].create(served.url)
        stories = [Story(node.store, f"s{n}") for n, node in enumerate(nodes)]
        for n in range(20):
            for story in stories:
                await story.play(f"{story.session_id}-{n}")
        await served.until(lambda: len(served.run_ids()) == 40)
        _, other = await leader_of(nodes)
        assert not other.dispatcher.deliveries
        assert len(served.accepted) == 40
        for story in stories:
            expected = [f"{story.session_id}-{n}" for n in range(20)]
            assert served.run_ids(story.session_id) == expected


async def test_r55_another_node_goes_on_after_one_is_lost(nodes: tuple[Node, Node]) -> None:
    async with endpoint() as served:
        webhook = await nodes[0].create(served.url)
        leader, other = await leader_of(nodes)
        story = Story(other.store, "s")
        await story.play("a")
        await served.until(lambda: served.run_ids() == ["a"])
        # It stops to renew, and releases nothing, as a node that was killed or cut off.
        assert leader.task is not None
        leader.dispatcher._renew = asyncio.Event().wait  # type: ignore[method-assign,assignment]
        await story.play("b")
        await other.until(webhook, lambda _: bool(other.dispatcher.deliveries))
        await story.play("c")
        await served.until(lambda: served.run_ids() == ["a", "b", "c"])
        fence = (await other.current(webhook)).fence
        assert leader.dispatcher._is_leased() is False
        assert other.dispatcher.deliveries[webhook.key].webhook.fence == fence
        # The lost node sends and writes nothing any more.
        count = len(served.accepted)
        await story.play("d")
        await served.until(lambda: served.run_ids() == ["a", "b", "c", "d"])
        assert len(served.accepted) == count + 1


async def test_r55_nodes_share_the_webhooks_and_lose_no_event(
    nodes: tuple[Node, Node], postgres_url: str
) -> None:
    async with endpoint() as served:
        for _ in range(6):
            await nodes[0].create(served.url)
        leader, other = await leader_of(nodes)
        story = Story(leader.store, "s")
        await story.play("alone")
        await served.until(lambda: len(served.accepted) == 6)
        sent = {"alone"}
        # Both are known to the cluster now, so the first one hands over what is beyond its share.
        beside = await plain(postgres_url)
        await beside.execute(
            "INSERT INTO nodes (node_id, address, heartbeat)"
            " VALUES ('a', '', now() + interval '1 hour'), ('b', '', now() + interval '1 hour')"
        )
        await beside.close()
        async with asyncio.timeout(10):
            while not len(leader.dispatcher.deliveries) == len(other.dispatcher.deliveries) == 3:
                name = f"r{len(sent)}"
                await story.play(name)
                sent.add(name)
        assert not leader.dispatcher.deliveries.keys() & other.dispatcher.deliveries.keys()
        await story.play("last")
        sent.add("last")
        names: dict[str, set[str]] = {}

        def arrived() -> bool:
            for it in served.accepted:
                names.setdefault(it.data["runId"], set()).add(it.headers["webhook-id"])
            return names.keys() == sent and all(len(ids) == 6 for ids in names.values())

        await served.until(arrived)
