"""What holds for every test, and a PostgreSQL for those that ask for one."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

import pytest
import structlog

if TYPE_CHECKING:
    from postgres import OwnPostgres


@pytest.fixture(autouse=True)
def _log_as_by_default() -> Iterator[None]:
    """What a test does to the log of this process ends with it."""
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


# What speaks to PostgreSQL is imported where it is asked for: it is an extra.


@pytest.fixture(scope="session")
def own_server() -> Iterator[OwnPostgres]:
    """A PostgreSQL of this test process, which a test may stop if it starts it again."""
    pytest.importorskip("asyncpg", reason="asyncpg is not installed")
    from postgres import own_postgres  # noqa: PLC0415

    with own_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server(request: pytest.FixtureRequest) -> str:
    """The URL of a PostgreSQL in which everybody has a schema of his own."""
    pytest.importorskip("asyncpg", reason="asyncpg is not installed")
    from postgres import OTHER_SERVER  # noqa: PLC0415

    if other := os.environ.get(OTHER_SERVER):
        return other
    server: OwnPostgres = request.getfixturevalue("own_server")
    return server.url


@pytest.fixture
async def postgres_url(postgres_server: str) -> AsyncIterator[str]:
    """The URL of a store in PostgreSQL that is not there yet."""
    from postgres import fresh_database  # noqa: PLC0415

    async with fresh_database(postgres_server) as url:
        yield url
