"""A backup is a consistent copy, or none; what is made of it is a store of its own."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from runlane_server.core.errors import StartError
from runlane_server.store.findings import Counts
from runlane_server.store.sqlite import backup as sqlite_backup
from runlane_server.store.sqlite.backup import back_up
from runlane_server.store.sqlite.check import check
from runlane_server.store.sqlite.store import SqliteStore
from support.story import Story


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runlane.db"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The target file, in a folder of its own."""
    folder = tmp_path / "backups"
    folder.mkdir()
    return folder / "copy.db"


async def filled(path: Path) -> None:
    """A store that was closed."""
    async with SqliteStore(path) as store:
        await Story(store).play("a")


async def test_backup_of_a_store_in_use_is_one_state_of_it(
    path: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commits in the middle of the copy are not in it, and do not make it begin again."""
    monkeypatch.setattr(sqlite_backup, "STEP_PAGES", 1)
    async with SqliteStore(path) as store:
        story = Story(store)
        for n in range(20):
            await story.play(f"r{n}", "x" * 5_000)
        writing = asyncio.Event()

        async def write_on() -> int:
            count = 0
            while not writing.is_set():
                await Story(store, f"late{count}").play(f"late{count}", "y" * 5_000)
                count += 1
            return count

        writer = asyncio.create_task(write_on())
        backups = [
            await asyncio.to_thread(back_up, path, copy.with_name(f"{n}.db")) for n in range(5)
        ]
        writing.set()
        assert await writer > 0
        seen = [backup.counts.runs for backup in backups]
        assert seen == sorted(seen)
        assert seen[-1] > 20
        assert check(path).problems == ()
    for n in range(5):
        assert check(copy.with_name(f"{n}.db")).problems == ()
        assert backups[n].size == copy.with_name(f"{n}.db").stat().st_size
    assert sorted(it.name for it in copy.parent.iterdir() if it.suffix == ".db") == [
        f"{n}.db" for n in range(5)
    ]
    assert not [*copy.parent.glob("*.partial*")]


async def test_backup_leaves_the_log_of_the_server_alone(path: Path, copy: Path) -> None:
    """Only the server checkpoints: what it had not copied into the file stays in its log."""
    wal = path.with_name("runlane.db-wal")
    async with SqliteStore(path) as store:
        await Story(store).play("a")
        before = (path.read_bytes(), wal.read_bytes())  # noqa: ASYNC240 - a test has the time
        await asyncio.to_thread(back_up, path, copy)
        check(path)
        assert (path.read_bytes(), wal.read_bytes()) == before  # noqa: ASYNC240


async def test_backup_after_a_crash_has_all_confirmed_runs(path: Path, copy: Path) -> None:
    crashed = path.with_name("crashed.db")
    async with SqliteStore(path) as store:
        await Story(store).play("a")
        for suffix in ("", "-wal"):
            _clone(path.with_name(path.name + suffix), crashed.with_name(crashed.name + suffix))
    wal = crashed.with_name("crashed.db-wal")
    before = _read(wal)
    assert back_up(crashed, copy).counts == Counts(1, 1, 1)
    assert _read(wal) == before  # for the server to recover from


async def test_restored_store_goes_on_and_has_a_name_of_its_own(path: Path, copy: Path) -> None:
    async with SqliteStore(path) as store:
        story = Story(store)
        await story.play("a")
        await story.accept("b")
        await story.start()
        back_up(path, copy)
        names = {store.store_id}
        await story.finish()
    second = copy.with_name("second.db")
    _clone(copy, second)
    for restored in (copy, second):
        assert check(restored).problems == ()
        async with SqliteStore(restored) as store:
            names.add(store.store_id)
            name = store.store_id
            story.store = store
            story.lane = await store.load_lane(story.key)
            await story.finish("another end")
            assert store.position == 2
        async with SqliteStore(restored) as store:
            assert store.store_id == name  # once and for all
    assert len(names) == 3
    assert all(len(name) == 8 for name in names)


# --- Where it is written to ---------------------------------------------------------------------


async def test_file_that_is_there_is_replaced_only_if_forced(path: Path, copy: Path) -> None:
    await filled(path)
    _write(copy, b"precious")
    with pytest.raises(StartError, match="the file exists; --force"):
        back_up(path, copy)
    assert _read(copy) == b"precious"
    back_up(path, copy, force=True)
    assert check(copy).counts == Counts(1, 1, 1)


@pytest.mark.parametrize("force", [False, True])
async def test_store_itself_is_never_written_over(path: Path, force: bool) -> None:
    await filled(path)
    before = _read(path)
    link = path.with_name("link.db")
    link.symlink_to(path)
    for target in (path, link):
        with pytest.raises(StartError, match="is the store itself"):
            back_up(path, target, force=force)
    assert _read(path) == before


async def test_store_of_another_server_is_never_written_over(path: Path, copy: Path) -> None:
    await filled(path)
    async with SqliteStore(copy) as store:
        with pytest.raises(StartError, match="another server"):
            back_up(path, copy, force=True)
        await Story(store).play("a")
    back_up(path, copy, force=True)  # nobody uses it any more


async def test_backup_that_was_killed_is_written_over(path: Path, copy: Path) -> None:
    await filled(path)
    partial = copy.with_name("copy.db.partial")
    _write(partial, b"half of it")
    back_up(path, copy)
    assert check(copy).problems == ()
    assert not partial.exists()


async def test_second_backup_does_not_disturb_a_running_one(path: Path, copy: Path) -> None:
    await filled(path)
    partial = copy.with_name("copy.db.partial")
    _write(partial, b"half of it")
    descriptor = os.open(partial, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(StartError, match="another backup is writing this file"):
            back_up(path, copy)
    finally:
        os.close(descriptor)
    assert _read(partial) == b"half of it"
    assert [it.name for it in copy.parent.iterdir()] == [partial.name]


async def test_damaged_copy_is_no_backup(path: Path, copy: Path) -> None:
    await filled(path)
    with closing(sqlite3.connect(path)) as db:
        page, size = db.execute(
            "SELECT rootpage, (SELECT page_size FROM pragma_page_size)"
            " FROM sqlite_master WHERE name = 'runs'"
        ).fetchone()
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    _write(copy, b"the last good one")
    with pytest.raises(StartError, match=r"damaged|malformed"):
        back_up(path, copy, force=True)
    assert _read(copy) == b"the last good one"
    assert [it.name for it in copy.parent.iterdir()] == ["copy.db"]


async def test_impossible_backup_fails_with_one_line(path: Path, copy: Path) -> None:
    with pytest.raises(StartError, match="the file does not exist"):
        back_up(path, copy)
    await filled(path)
    with pytest.raises(StartError, match="is a directory"):
        back_up(path, copy.parent)
    with pytest.raises(StartError, match="No such file or directory"):
        back_up(path, copy.parent / "none" / "copy.db")


def _clone(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())


def _read(path: Path) -> bytes:
    return path.read_bytes()


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
