"""Which store a URL names."""

from __future__ import annotations

from pathlib import Path

from runlane_server.core.errors import StartError
from runlane_server.store.base import Store
from runlane_server.store.memory import MemoryStore
from runlane_server.store.sqlite import SqliteStore


def open_store(url: str) -> Store:
    """The store that a URL names, not opened yet. Raises StartError."""
    return MemoryStore() if url == "memory:" else SqliteStore(database_path(url))


def database_path(url: str) -> Path:
    """The database file that the URL of a store names. Raises StartError if it names none."""
    scheme, _, rest = url.partition(":")
    if scheme == "sqlite" and rest.startswith("///") and rest != "///":
        return Path(rest.removeprefix("///"))
    if scheme in {"postgresql", "postgres"}:
        raise StartError(f"--store {scheme}: is not in this version; use sqlite:///PATH")
    if url == "memory:":
        raise StartError("--store memory: is gone with its server, and is in no file")
    raise StartError(f"--store {url!r}: there are sqlite:///PATH and memory:")
