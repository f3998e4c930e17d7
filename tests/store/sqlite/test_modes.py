"""The files of a store are readable by their owner only, under any umask."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runlane_server.core.errors import StartError
from runlane_server.store.sqlite.backup import back_up
from runlane_server.store.sqlite.store import SqliteStore
from support.story import Story


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder: Path) -> dict[str, str]:
    return {file.name: oct(file.stat().st_mode & 0o777) for file in folder.iterdir()}


def publish(folder: Path) -> None:
    for file in folder.iterdir():
        file.chmod(0o644)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o777], ids=oct)
async def test_new_store_and_backup_are_private(mask: int, tmp_path: Path) -> None:
    backup = tmp_path / "backups"
    backup.mkdir()
    stores = tmp_path / "stores"
    stores.mkdir()
    path = stores / "runlane.db"
    with umask(mask):
        async with SqliteStore(path) as store:
            await Story(store).play("a")
            assert modes(stores) == dict.fromkeys(
                ("runlane.db", "runlane.db-wal", "runlane.db-shm", "runlane.db.lock"), "0o600"
            )
            back_up(path, backup / "copy.db")
    assert modes(backup) == {"copy.db": "0o600"}


async def test_existing_files_become_private(tmp_path: Path) -> None:
    path = tmp_path / "real.db"
    async with SqliteStore(path) as store:
        await Story(store).play("a")
    publish(tmp_path)
    link = tmp_path / "linked"
    link.mkdir()
    (link / "runlane.db").symlink_to(path)
    async with SqliteStore(link / "runlane.db") as store:
        await Story(store, "another").play("b")
        assert {mode for name, mode in modes(tmp_path).items() if name != "linked"} == {"0o600"}


async def test_database_of_another_program_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    path.write_bytes(b"not a database, but a file of another program" * 100)
    path.chmod(0o644)
    with pytest.raises(StartError):
        await SqliteStore(path).__aenter__()
    assert modes(tmp_path)["other.db"] == "0o644"
