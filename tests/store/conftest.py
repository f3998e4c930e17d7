"""Every kind of store, empty and open."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from runlane_server.store.base import Store
from runlane_server.store.memory import MemoryStore
from runlane_server.store.sqlite import SqliteStore
from runlane_server.stores import open_store
from store.story import Story, Witness

if TYPE_CHECKING:
    from postgres import Connection

# They speak to the database with its driver, which is an extra.
collect_ignore_glob = [] if importlib.util.find_spec("asyncpg") else ["test_postgres*.py"]


@pytest.fixture(params=["memory", "sqlite", "postgres"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """An empty store."""
    async with AsyncExitStack() as closing:
        made: Store
        match request.param:
            case "memory":
                made = MemoryStore()
            case "sqlite":
                made = SqliteStore(tmp_path / "runlane.db")
            case _:
                server = request.getfixturevalue("postgres_server")
                from postgres import fresh_database  # noqa: PLC0415 - an optional extra

                made = open_store(await closing.enter_async_context(fresh_database(server)))
        yield await closing.enter_async_context(made)


@pytest.fixture
async def beside(postgres_url: str) -> AsyncIterator[Connection]:
    """A connection beside the store, in its schema."""
    from postgres import plain  # noqa: PLC0415 - an optional extra

    connection = await plain(postgres_url)
    yield connection
    await connection.close()


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
