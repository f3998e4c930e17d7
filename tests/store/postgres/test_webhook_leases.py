"""Which node delivers for a webhook, by the clock of the database."""

from __future__ import annotations

from runlane_server.store.postgres.store import PostgresStore
from runlane_server.store.webhooks import Progress, Webhook, WebhookFilter, WebhookKey
from support.postgres import Connection, postgres_store

KEY = WebhookKey("tenant", "hook")


async def new_webhook(store: PostgresStore, key: WebhookKey = KEY) -> None:
    url = "https://example.org/"
    await store.webhooks.create(Webhook(key, url, ("s",), WebhookFilter(), False, True, 1, 1))


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


async def test_a_node_keeps_its_webhooks_before_it_takes_others(postgres_url: str) -> None:
    async with postgres_store(postgres_url) as one, postgres_store(postgres_url) as two:
        await new_webhook(one, WebhookKey("tenant", "a"))
        await new_webhook(one, WebhookKey("tenant", "b"))
        [first] = await two.webhooks.lease("two", 60, 1)
        [second] = await one.webhooks.lease("one", 60, 9)
        assert {first.key.webhook_id, second.key.webhook_id} == {"a", "b"}
        assert [it.key for it in await two.webhooks.lease("two", 60, 1)] == [first.key]
