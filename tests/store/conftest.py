"""Fixtures for the tests of the stores."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

from runlane_server.store.base import Store
from support.story import Story, Witness

if TYPE_CHECKING:
    from support.postgres import Connection

# They use the driver of the database, which is an extra.
collect_ignore_glob = [] if importlib.util.find_spec("asyncpg") else ["postgres/*"]


@pytest.fixture
async def beside(postgres_url: str) -> AsyncIterator[Connection]:
    """A connection beside the store, in its schema."""
    from support.postgres import plain  # noqa: PLC0415 - an optional extra

    connection = await plain(postgres_url)
    yield connection
    await connection.close()


@pytest.fixture
def witness(store: Store) -> Witness:
    """The records that the listener of the store received."""
    witness = Witness()
    store.listener = witness
    return witness


@pytest.fixture
def story(store: Store) -> Story:
    """A session that is not there yet."""
    return Story(store)
