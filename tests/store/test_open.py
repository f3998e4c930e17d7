"""The URL of a store: what it may be, and what is said of one that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from runlane_server.core.errors import SettingsError, StartError
from runlane_server.store.memory.store import MemoryStore
from runlane_server.store.open import StoreKind, StoreUrl, open_store
from runlane_server.store.sqlite.store import SqliteStore


def test_url_of_memory_has_no_file() -> None:
    url = StoreUrl.parse("memory:")
    assert url == StoreUrl(StoreKind.MEMORY)
    assert not url.is_shareable
    assert isinstance(open_store(url), MemoryStore)
    with pytest.raises(StartError, match=r"--store memory: .* has no file"):
        _ = url.file


@pytest.mark.parametrize(
    ("text", "path"),
    [("sqlite:///runlane.db", "runlane.db"), ("sqlite:////var/lib/x.db", "/var/lib/x.db")],
)
def test_url_of_sqlite_names_a_file(text: str, path: str) -> None:
    url = StoreUrl.parse(text)
    assert (url.kind, url.file, url.is_shareable) == ("sqlite", Path(path), False)
    assert isinstance(open_store(url), SqliteStore)


@pytest.mark.parametrize("text", ["postgresql://me:hunter2@h/d", "postgres://me:hunter2@h/d"])
def test_url_of_postgresql_names_a_database_and_hides_the_password(text: str) -> None:
    url = StoreUrl.parse(text)
    assert (url.kind, url.is_shareable) == ("postgresql", True)
    assert url.database is not None
    assert url.database.dsn == text
    assert "hunter2" not in repr(url)
    with pytest.raises(StartError, match=r"--store postgresql: .* has no file"):
        _ = url.file


@pytest.mark.parametrize(
    "text", ["", "runlane.db", "memory", "memory:x", "sqlite:runlane.db", "sqlite:///", "mysql://h"]
)
def test_url_of_no_store_is_refused_with_the_kinds_there_are(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--store: .*sqlite:///PATH"):
        StoreUrl.parse(text)


def test_refusal_of_a_url_never_shows_a_password() -> None:
    with pytest.raises(SettingsError) as refused:
        StoreUrl.parse("mysql://me:hunter2@h/d")
    assert "hunter2" not in str(refused.value)
