"""Nodes that deliver to webhooks, over a store that is open."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any

from runlane_server.feed.feed import Feed
from runlane_server.rpc.webhook_payload import WebhookPayload
from runlane_server.store.base import Store
from runlane_server.store.webhooks import Webhook, WebhookFilter
from runlane_server.webhooks.attempts import OF_ALL, OF_TENANT, Counts, Parts, Schedule
from runlane_server.webhooks.destination import Destinations
from runlane_server.webhooks.dispatcher import Dispatcher
from runlane_server.webhooks.lifetime import LASTING, Lifetime
from runlane_server.webhooks.registry import Webhooks
from runlane_server.webhooks.secret_keys import NO_KEYS, SecretKeys
from runlane_server.webhooks.sender import Sender
from runlane_server.webhooks.shares import Shares
from support.story import TENANT

QUICK = Schedule(delays=(0.02, 0.02, 0.02, 0.02), longest_pause=0.05)
LOCAL = Destinations([ip_network("127.0.0.0/8")])


def real_time() -> int:
    return time.time_ns() // 1_000


@dataclass
class Node:
    """A node that delivers, over a store that may have others."""

    store: Store
    feed: Feed
    dispatcher: Dispatcher
    webhooks: Webhooks
    parts: Parts
    task: asyncio.Task[None] | None = None

    async def create(self, url: str, wanted: WebhookFilter | None = None, **more: Any) -> Webhook:
        options: dict[str, Any] = {"secret": "", "full": False, "enabled": True} | more
        return await self.webhooks.create(
            TENANT, url=url, wanted=wanted or WebhookFilter(), **options
        )

    async def current(self, webhook: Webhook) -> Webhook:
        return await self.webhooks.get(webhook.key)

    async def until(self, webhook: Webhook, condition: Callable[[Webhook], bool]) -> Webhook:
        async with asyncio.timeout(30):
            while not condition(found := await self.current(webhook)):
                await asyncio.sleep(0.01)
        return found

    async def delivers_revision(self, webhook: Webhook, revision: int) -> None:
        """Waits until a change is in effect here."""
        async with asyncio.timeout(10):
            while True:
                delivery = self.dispatcher.deliveries.get(webhook.key)
                if delivery is not None and delivery.webhook.revision == revision:
                    return
                await asyncio.sleep(0.01)

    async def kill(self) -> None:
        """Ends the deliveries without their last write, as a crash does."""
        assert self.task is not None
        for running in self.dispatcher.deliveries.values():
            running._is_dirty = False
            running._on_change = lambda: None  # type: ignore[method-assign]
        self.task.cancel()
        await asyncio.wait([self.task])


def new_node(
    store: Store,
    schedule: Schedule = QUICK,
    now: Callable[[], int] = real_time,
    keys: SecretKeys = NO_KEYS,
    lifetime: Lifetime = LASTING,
) -> Node:
    feed = Feed(store)
    dispatcher = Dispatcher(f"node-{time.monotonic_ns()}", store)
    parts = Parts(
        store=store,
        feed=feed,
        sender=Sender(LOCAL),
        encode=WebhookPayload(store.store_id),
        now=now,
        last_input=dispatcher.last_input,
        slots=Shares(OF_ALL, OF_TENANT),
        counts=Counts(),
        schedule=schedule,
        keys=keys,
        lifetime=lifetime,
    )
    return Node(store, feed, dispatcher, Webhooks(store, dispatcher, LOCAL, now, keys), parts)


@asynccontextmanager
async def delivering(store: Store, **options: Any) -> AsyncIterator[Node]:
    node = new_node(store, **options)
    node.task = asyncio.create_task(node.dispatcher.keep_delivering(node.parts))
    try:
        yield node
    finally:
        node.task.cancel()
        await asyncio.wait([node.task])
        node.feed.close()
        node.parts.sender.close()
