"""The webhooks of a node, with all that delivers for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_network

import structlog
from uuid_utils import uuid7

from runlane_server.config import Config
from runlane_server.engine.coordinator import Coordinator
from runlane_server.rpc.webhook_payload import WebhookPayload
from runlane_server.webhooks.attempts import OF_ALL, OF_TENANT, Counts, Parts
from runlane_server.webhooks.destination import Destinations
from runlane_server.webhooks.dispatcher import Dispatcher
from runlane_server.webhooks.registry import Webhooks
from runlane_server.webhooks.secret_keys import SecretKeys
from runlane_server.webhooks.sender import Sender
from runlane_server.webhooks.shares import Shares

log = structlog.get_logger()


class NodeWebhooks:
    """The registry of webhooks, and the deliveries of this node."""

    def __init__(self, config: Config, coordinator: Coordinator, counts: Counts) -> None:
        store = coordinator.store
        destinations = Destinations(tuple(map(ip_network, config.webhook_allow_network)))
        self.dispatcher = Dispatcher(str(uuid7()), store)
        keys = SecretKeys.read(config.webhook_keys)
        self.registry = Webhooks(store, self.dispatcher, destinations, coordinator.now, keys)
        self._parts = Parts(
            store=store,
            feed=coordinator.feed,
            sender=Sender(destinations),
            encode=WebhookPayload(store.store_id),
            now=coordinator.now,
            last_input=self.dispatcher.last_input,
            slots=Shares(OF_ALL, OF_TENANT),
            counts=counts,
            keys=keys,
            challenges=not config.webhook_unconfirmed,
        )

    @asynccontextmanager
    async def delivering(self) -> AsyncIterator[None]:
        """Delivers inside the context, until the store is about to close."""
        task = asyncio.create_task(self.dispatcher.keep_delivering(self._parts))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled() and (failure := task.exception()) is not None:
                log.error("webhooks failed", exc_info=failure)
            self._parts.sender.close()
