"""The store that `--store` names: its URL, parsed once, and the store that serves it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from runlane_server.core.errors import SettingsError, StartError
from runlane_server.extras import require
from runlane_server.store.base import Store
from runlane_server.store.memory.store import MemoryStore
from runlane_server.store.postgres.database import Database
from runlane_server.store.sqlite.store import SqliteStore


class StoreKind(StrEnum):
    """The kinds of store; the value is the name in logs and metrics."""

    MEMORY = "memory"
    SQLITE = "sqlite"
    POSTGRESQL = "postgresql"


_IN_NO_FILE = {
    StoreKind.MEMORY: "a memory store ends with its server and has no file",
    StoreKind.POSTGRESQL: "a PostgreSQL store has no file; use PostgreSQL's own tools",
}


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """The URL of a store, parsed. `path` is set for SQLite, and `database` for PostgreSQL."""

    kind: StoreKind
    path: Path | None = None
    database: Database | None = None

    @classmethod
    def parse(cls, text: str) -> StoreUrl:
        """Parses the value of `--store`. Raises SettingsError, which never repeats a password."""
        scheme, _, rest = text.partition(":")
        if text == "memory:":
            return cls(StoreKind.MEMORY)
        if scheme == "sqlite" and rest.startswith("///") and rest != "///":
            return cls(StoreKind.SQLITE, path=Path(rest.removeprefix("///")))
        if scheme in {"postgresql", "postgres"}:
            return cls(StoreKind.POSTGRESQL, database=Database.parse(text))
        # Only the scheme: the rest may hold a password.
        raise SettingsError(
            f"--store: {scheme!r} is not the URL of a store;"
            " use sqlite:///PATH, postgresql://... or memory:"
        )

    @property
    def is_shareable(self) -> bool:
        """Whether several nodes can use the store at the same time."""
        return self.database is not None

    @property
    def name(self) -> str:
        """Names the store, without user and password: it may be written to files."""
        if self.database is not None:
            return f"{self.database.label} {self.database.schema}"
        return self.kind if self.path is None else str(self.path.absolute())

    @property
    def file(self) -> Path:
        """The database file. Raises StartError if the store has none."""
        if self.path is None:
            raise StartError(f"--store {self.kind}: {_IN_NO_FILE[self.kind]}")
        return self.path


def open_store(url: StoreUrl) -> Store:
    """The store of a URL, not opened yet. Raises StartError if its driver is not installed."""
    if url.database is not None:
        return _postgres(url.database)
    return MemoryStore() if url.path is None else SqliteStore(url.path)


def check_driver() -> None:
    """Raises SettingsError if the driver of PostgreSQL is not installed."""
    require("asyncpg", "--store postgresql")


def _postgres(database: Database) -> Store:
    check_driver()
    from runlane_server.store.postgres.store import PostgresStore  # noqa: PLC0415 - an optional extra

    return PostgresStore(database)
