"""Stores and nodes for the tests of the coordinator."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coordinator.node import Node, running
from runlane_server.store.base import Store
from runlane_server.store.memory import MemoryStore
from runlane_server.store.sqlite import SqliteStore


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    stores: dict[str, Store] = {"memory": MemoryStore(), "sqlite": SqliteStore(tmp_path / "a.db")}
    async with stores[request.param] as opened:
        yield opened


@pytest.fixture
async def node(store: Store) -> AsyncIterator[Node]:
    async with running(store) as made:
        yield made
