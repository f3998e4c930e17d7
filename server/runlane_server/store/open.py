"""Which store a URL names."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from runlane_server.core.errors import SettingsError, StartError
from runlane_server.store.base import Store
from runlane_server.store.memory.store import MemoryStore
from runlane_server.store.sqlite.store import SqliteStore

_POSTGRES = frozenset({"postgresql", "postgres"})


def open_store(url: str) -> Store:
    """The store that a URL names, not opened yet. Raises StartError."""
    if url == "memory:":
        return MemoryStore()
    if can_be_shared(url):
        return _postgres(url)
    return SqliteStore(database_path(url))


def kind_of(url: str) -> str:
    """`memory`, `sqlite` or `postgresql`."""
    return "postgresql" if can_be_shared(url) else url.partition(":")[0]


def can_be_shared(url: str) -> bool:
    """Whether several nodes can work over the store that a URL names."""
    return url.partition(":")[0] in _POSTGRES


def _postgres(url: str) -> Store:
    if importlib.util.find_spec("asyncpg") is None:
        raise StartError(
            "--store postgresql: it is not installed; run pip install 'runlane[server,postgres]'"
        )
    from runlane_server.store.postgres.store import PostgresStore  # noqa: PLC0415 - an optional extra

    return PostgresStore(url)


def database_path(url: str) -> Path:
    """The database file that the URL of a store names. Raises StartError if it names none."""
    scheme, _, rest = url.partition(":")
    if scheme == "sqlite" and rest.startswith("///") and rest != "///":
        return Path(rest.removeprefix("///"))
    if scheme in _POSTGRES:
        raise StartError(f"--store {scheme}: is in no file; use the tools of PostgreSQL")
    if url == "memory:":
        raise StartError("--store memory: is gone with its server, and is in no file")
    # Only the kind: what follows may hold a password.
    raise SettingsError(f"--store {scheme}: there are sqlite:///PATH, postgresql://... and memory:")
