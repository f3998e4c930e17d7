"""Which node delivers for a webhook, by the clock of the database."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from functools import partial

from runlane_server.store.postgres.store import PostgresStore
from runlane_server.store.webhooks import Most, Progress, Webhook, WebhookFilter, WebhookKey
from support.postgres import Connection, postgres_store

KEY = WebhookKey("tenant", "hook")


async def new_webhook(store: PostgresStore, key: WebhookKey = KEY, most: int = 100) -> bool:
    url = "https://example.org/"
    return await store.webhooks.create(
        Webhook(key, url, ("s",), WebhookFilter(), False, True, 1, 1), most=Most(most, most)
    )


async def test_r55_one_node_at_a_time_delivers_for_a_webhook(
    postgres_url: str, beside: Connection
) -> None:
    async with postgres_store(postgres_url) as one, postgres_store(postgres_url) as two:
        await new_webhook(one)
        [mine] = await one.webhooks.lease("one", 60, 9)
        assert await two.webhooks.lease("two", 60, 9) == []
        assert await one.webhooks.lease("one", 60, 9) == [mine]  # renewed
        # The node is gone, or was paused for longer than its lease.
        await beside.execute("UPDATE webhooks SET leased_until = now() - interval '1 second'")
        [theirs] = await two.webhooks.lease("two", 60, 9)
        assert theirs.fence > mine.fence
        assert await one.webhooks.lease("one", 60, 9) == []
        assert not await one.webhooks.save(KEY, mine.fence, Progress(delivered=9))
        assert await two.webhooks.save(KEY, theirs.fence, Progress(delivered=1))
        await two.webhooks.release("two")
        [again] = await one.webhooks.lease("one", 60, 9)
        assert again.fence > theirs.fence


async def test_nodes_together_create_no_more_webhooks_than_a_tenant_may_have(
    postgres_url: str,
) -> None:
    async with AsyncExitStack() as closing:
        nodes = [await closing.enter_async_context(postgres_store(postgres_url)) for _ in range(4)]
        made = await asyncio.gather(
            *(new_webhook(nodes[n % 4], WebhookKey("t", f"h{n}"), most=10) for n in range(80))
        )
        assert sum(made) == 10
        assert len((await nodes[0].webhooks.list("t", after=None, limit=80)).items) == 10
        # A repetition, after an answer that was lost, is no other webhook.
        again = WebhookKey("t", f"h{made.index(True)}")
        assert await new_webhook(nodes[0], again, most=10)


async def test_nodes_share_the_webhooks(postgres_url: str, beside: Connection) -> None:
    async with postgres_store(postgres_url) as store:
        for n in range(10):
            await new_webhook(store, WebhookKey("tenant", f"h{n}"))
        lease = partial(store.webhooks.lease, seconds=60, limit=99)
        await beside.execute("INSERT INTO nodes (node_id, address) VALUES ('a', '')")
        assert [one.is_excess for one in await lease("one")] == [False] * 10
        # Two more nodes come.
        await beside.execute("INSERT INTO nodes (node_id, address) VALUES ('b', ''), ('c', '')")
        assert await lease("two") == []
        excess = [one.key for one in await lease("one") if one.is_excess]
        assert len(excess) == 6
        await store.webhooks.release("one", excess)
        assert len(await lease("one")) == 4
        two, three = await lease("two"), await lease("three")
        assert [len(two), len(three)] == [4, 2]
        assert {one.key for one in (*two, *three)} == set(excess)
        assert not any(one.is_excess for one in (*two, *three, *await lease("one")))
        # One is lost: another one has all of its webhooks at once, and shares them later.
        await beside.execute(
            "UPDATE webhooks SET leased_until = now() - interval '1 second' WHERE leased_by = 'one'"
        )
        assert len(await lease("two")) == 8
        await beside.execute("UPDATE nodes SET lost = true WHERE node_id = 'a'")
        assert [one.is_excess for one in await lease("two")] == [False] * 5 + [True] * 3


async def test_r55_a_node_that_is_silent_for_a_lease_has_no_share(
    postgres_url: str, beside: Connection
) -> None:
    """It may be declared dead much later: the lease of a node may be longer than a webhook's."""
    async with postgres_store(postgres_url) as store:
        for n in range(6):
            await new_webhook(store, WebhookKey("tenant", f"h{n}"))
        await beside.execute("INSERT INTO nodes (node_id, address) VALUES ('a', ''), ('b', '')")
        lease = partial(store.webhooks.lease, seconds=15, limit=99)
        assert [len(await lease("one")), len(await lease("two"))] == [3, 3]
        await beside.execute(
            "UPDATE webhooks SET leased_until = now() - interval '1 second' WHERE leased_by = 'two'"
        )
        await beside.execute(
            "UPDATE nodes SET heartbeat = now() - interval '16 s' WHERE node_id = 'b'"
        )
        for _ in range(2):
            assert [one.is_excess for one in await lease("one")] == [False] * 6
        # It was only paused.
        await store.cluster.heartbeat("b", 60)
        excess = [one.key for one in await lease("one") if one.is_excess]
        await store.webhooks.release("one", excess)
        assert {one.key for one in await lease("two")} == set(excess)
        assert len(excess) == 3


async def test_a_node_keeps_its_webhooks_before_it_takes_others(postgres_url: str) -> None:
    async with postgres_store(postgres_url) as one, postgres_store(postgres_url) as two:
        await new_webhook(one, WebhookKey("tenant", "a"))
        await new_webhook(one, WebhookKey("tenant", "b"))
        [first] = await two.webhooks.lease("two", 60, 1)
        [second] = await one.webhooks.lease("one", 60, 9)
        assert {first.key.webhook_id, second.key.webhook_id} == {"a", "b"}
        assert [it.key for it in await two.webhooks.lease("two", 60, 1)] == [first.key]
