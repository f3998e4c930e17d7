"""Fixtures of all tests, and the choice of the store that a test uses.

A test that can use any store requests `store_url` or `store`. `pytest --store postgresql` runs
exactly these tests, over that store. Without the option each runs over the stores of its suite.
`--not-usual` leaves out the tests that run over that store without the option too.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import AsyncIterator, Iterator, Sequence
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

# They use the driver of PostgreSQL, which is an extra; so do those that tests/store skips.
collect_ignore = (
    [] if importlib.util.find_spec("asyncpg") else ["engine/test_nodes.py", "engine/test_outage.py"]
)

STORES = ("memory", "sqlite", "postgresql")

LEASE = "3s"
"""Lease of the servers under test: their runs are recovered this long after a kill."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--store",
        choices=("sqlite", "postgresql"),
        help="run only the tests that can use any store, over this one",
    )
    parser.addoption(
        "--not-usual",
        action="store_true",
        help="with --store: without the tests that use this store without the option too",
    )


def pytest_configure(config: pytest.Config) -> None:
    # With rich, one traceback holds the event loop for seconds, longer than a lease under load.
    for processor in structlog.get_config()["processors"]:
        if isinstance(processor, structlog.dev.ConsoleRenderer):
            processor.exception_formatter = structlog.dev.plain_traceback
    for marker in (
        "stores(*kinds): the stores that a test uses without --store",
        "sqlite(reason): the test needs SQLite",
    ):
        config.addinivalue_line("markers", marker)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Chooses the stores of a test: `--store`, `@pytest.mark.stores`, or those of its suite."""
    if "store_kind" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--store")
        usual = _usual_stores(metafunc.definition, metafunc.fixturenames)
        metafunc.parametrize("store_kind", (chosen,) if chosen else usual)


def _usual_stores(test: pytest.Item, fixtures: Sequence[str]) -> Sequence[str]:
    """The stores of a test without `--store`."""
    if marked := test.get_closest_marker("stores"):
        return marked.args
    # In this process all are cheap. A server process uses its default store.
    return STORES if "store" in fixtures else ("sqlite",)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--store`, deselects tests of one store and skips those that need SQLite."""
    if not (chosen := config.getoption("--store")):
        return

    def is_wanted(item: pytest.Item) -> bool:
        fixtures = getattr(item, "fixturenames", ())
        usual = config.getoption("--not-usual") and chosen in _usual_stores(item, fixtures)
        return _works_over_any(fixtures) and not usual

    config.hook.pytest_deselected(items=[item for item in items if not is_wanted(item)])
    items[:] = filter(is_wanted, items)
    for item in items:
        if chosen != "sqlite" and (marked := item.get_closest_marker("sqlite")):
            item.add_marker(pytest.mark.skip(reason=f"needs SQLite: {marked.args[0]}"))


def _works_over_any(fixtures: Sequence[str]) -> bool:
    return "store_kind" in fixtures and "postgres_url" not in fixtures


@pytest.fixture(autouse=True)
def _log_as_by_default() -> Iterator[None]:
    """Resets the log configuration of this process after each test."""
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


# asyncpg is an extra, so its users are imported inside the fixtures.


@pytest.fixture(scope="session")
def own_server() -> Iterator[OwnPostgres]:
    """A PostgreSQL of this test process. A test that stops it has to start it again."""
    pytest.importorskip("asyncpg", reason="asyncpg is not installed")
    from support.postgres import own_postgres  # noqa: PLC0415

    with own_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server(request: pytest.FixtureRequest) -> str:
    """The URL of a PostgreSQL in which each test has its own schema."""
    pytest.importorskip("asyncpg", reason="asyncpg is not installed")
    from support.postgres import OTHER_SERVER  # noqa: PLC0415

    if other := os.environ.get(OTHER_SERVER):
        return other
    server: OwnPostgres = request.getfixturevalue("own_server")
    return server.url


@pytest.fixture
async def postgres_url(postgres_server: str) -> AsyncIterator[str]:
    """The URL of a PostgreSQL store that does not exist yet."""
    from support.postgres import fresh_database  # noqa: PLC0415

    async with fresh_database(postgres_server) as url:
        yield url


@pytest.fixture
async def store_url(
    store_kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[str]:
    """The URL of a store that does not exist yet. Opened again, it is the same store."""
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
    """A running coordinator over the store of the test."""
    async with running(store) as made:
        yield made


@pytest.fixture
def served_store(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Server processes use the store of the test by default.

    SQLite needs no setting: it is the default, with a file in the folder of the server.
    """
    if not store_url.startswith("sqlite:"):
        monkeypatch.setenv("RUNLANE_STORE", store_url)
        monkeypatch.setenv("RUNLANE_NODE_LEASE", LEASE)
