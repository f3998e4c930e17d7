"""Every kind of store, empty and open."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from runlane_server.store.base import Store
from runlane_server.store.memory import MemoryStore
from runlane_server.store.sqlite import SqliteStore
from store.story import Story, Witness


def make(kind: str, folder: Path) -> Store:
    """A store of that kind, not yet open."""
    return MemoryStore() if kind == "memory" else SqliteStore(folder / "runlane.db")


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """An empty store."""
    async with make(request.param, tmp_path) as opened:
        yield opened


@pytest.fixture
def witness(store: Store) -> Witness:
    """What the store told."""
    witness = Witness()
    store.listener = witness
    return witness


@pytest.fixture
def story(store: Store) -> Story:
    """A session that is not there yet."""
    return Story(store)
