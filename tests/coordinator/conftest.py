"""A node for the tests of the coordinator."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from coordinator.node import Node, running
from runlane_server.store.base import Store


@pytest.fixture
async def node(store: Store) -> AsyncIterator[Node]:
    async with running(store) as made:
        yield made
