"""What holds for every test, and the store that a test works over.

Tests that work over any store ask for `store_url` or `store`. `pytest --store postgresql` runs all
of them over that one, and nothing else; without it each runs over what suits its suite.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog

from runlane_server.store.base import Store
from runlane_server.store.open import StoreUrl, open_store
from support.node import Node, running

if TYPE_CHECKING:
    from support.postgres import OwnPostgres

STORES = ("memory", "sqlite", "postgresql")

LEASE = "3s"
"""How long a server is missed that was killed: what it left behind is waited for."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--store",
        choices=("sqlite", "postgresql"),
        help="run what works over any store, over this one, and no more",
    )


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "stores(*kinds): the stores over which a test runs where nobody names one",
        "sqlite(reason): a test of what only SQLite has",
    ):
        config.addinivalue_line("markers", marker)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Says over which stores a test runs: `@pytest.mark.stores`, or what suits its suite."""
    if "store_kind" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--store")
        marked = metafunc.definition.get_closest_marker("stores")
        # In this process all are cheap; for a server the one that it has if nobody says so.
        usual = STORES if "store" in metafunc.fixturenames else ("sqlite",)
        kinds = (chosen,) if chosen else marked.args if marked else usual
        metafunc.parametrize("store_kind", kinds)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--store`, what works over any store is left; what is of SQLite alone is skipped."""
    if not (chosen := config.getoption("--store")):
        return
    config.hook.pytest_deselected(items=[item for item in items if not _works_over_any(item)])
    items[:] = filter(_works_over_any, items)
    for item in items:
        if chosen != "sqlite" and (marked := item.get_closest_marker("sqlite")):
            item.add_marker(pytest.mark.skip(reason=f"of SQLite alone: {marked.args[0]}"))


def _works_over_any(item: pytest.Item) -> bool:
    names = getattr(item, "fixturenames", ())
    return "store_kind" in names and "postgres_url" not in names


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
    from support.postgres import own_postgres  # noqa: PLC0415

    with own_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server(request: pytest.FixtureRequest) -> str:
    """The URL of a PostgreSQL in which everybody has a schema of his own."""
    pytest.importorskip("asyncpg", reason="asyncpg is not installed")
    from support.postgres import OTHER_SERVER  # noqa: PLC0415

    if other := os.environ.get(OTHER_SERVER):
        return other
    server: OwnPostgres = request.getfixturevalue("own_server")
    return server.url


@pytest.fixture
async def postgres_url(postgres_server: str) -> AsyncIterator[str]:
    """The URL of a store in PostgreSQL that is not there yet."""
    from support.postgres import fresh_database  # noqa: PLC0415

    async with fresh_database(postgres_server) as url:
        yield url


@pytest.fixture
async def store_url(
    store_kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[str]:
    """The URL of a store that is not there yet. What is opened by it again is the same store."""
    async with AsyncExitStack() as closing:
        match store_kind:
            case "memory":
                yield "memory:"
            case "sqlite":
                yield f"sqlite:///{tmp_path}/runlane.db"
            case _:
                server = request.getfixturevalue("postgres_server")
                from support.postgres import fresh_database  # noqa: PLC0415

                yield await closing.enter_async_context(fresh_database(server))


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    """An empty store, open."""
    async with open_store(StoreUrl.parse(store_url)) as opened:
        yield opened


@pytest.fixture
async def node(store: Store) -> AsyncIterator[Node]:
    """A coordinator over the store of the test, started."""
    async with running(store) as made:
        yield made


@pytest.fixture
def served_store(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that are started work over the store of the test, unless told of another one.

    SQLite is what they have by themselves, in the folder in which they are started.
    """
    if not store_url.startswith("sqlite:"):
        monkeypatch.setenv("RUNLANE_STORE", store_url)
        monkeypatch.setenv("RUNLANE_NODE_LEASE", LEASE)
