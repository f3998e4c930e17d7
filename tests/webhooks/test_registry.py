"""How many webhooks a tenant may have."""

from __future__ import annotations

import asyncio

import pytest

from runlane_server.core.errors import QuotaExceeded
from runlane_server.store.base import Store
from runlane_server.webhooks import registry
from support.deliveries import new_node
from support.story import TENANT


async def test_r55_concurrent_creations_stay_within_the_limit(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "MAX_OF_TENANT", 5)
    node = new_node(store)
    made = await asyncio.gather(
        *(node.create("http://127.0.0.1:9/") for _ in range(40)), return_exceptions=True
    )
    refused = [it for it in made if isinstance(it, QuotaExceeded)]
    assert (len(made), len(refused)) == (40, 35)
    page = await node.webhooks.list(TENANT, after=None, limit=9)
    assert len(page.items) == 5
    await node.webhooks.delete(page.items[0].key)
    await node.create("http://127.0.0.1:9/")
    node.feed.close()
    node.parts.sender.close()
