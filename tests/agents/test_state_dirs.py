"""The directories that agents keep for sessions."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from runlane_server.agents.state_dirs import HOME, StateDirs, safe_name
from runlane_server.core.model import SessionKey

ODD = ["..", ".", "/etc", "a/b", "", "A", "a", "ä" * 200, "x" * 5000, "\n", "-rf", "~", "con"]


def test_names_are_safe_and_differ() -> None:
    names = [safe_name(text) for text in ODD]
    assert len({name.lower() for name in names}) == len(ODD)
    for name in names:
        assert "/" not in name
        assert not name.startswith(".")
        assert len(name.encode()) <= 255


def test_every_session_has_a_private_directory_of_its_own(tmp_path: Path) -> None:
    states = StateDirs(tmp_path / "new" / "root")
    keys = [SessionKey(tenant, session) for tenant in ODD for session in ODD]
    paths = {states.open(key) for key in keys}
    assert len(paths) == len(keys)
    for path in paths:
        assert path.parent.parent == tmp_path / "new" / "root"
        assert [one.stat().st_mode & 0o777 for one in (path.parent, path, path / HOME)] == [
            0o700
        ] * 3
    assert states.open(keys[0]) in paths
    states.close()


@pytest.mark.parametrize("part", ["tenant", "session", "home"])
def test_a_link_in_the_place_of_a_directory_is_refused(tmp_path: Path, part: str) -> None:
    states = StateDirs(tmp_path / "root")
    key = SessionKey("t", "s")
    path = states.open(key)
    place = {"tenant": path.parent, "session": path, "home": path / HOME}[part]
    place.rename(tmp_path / "moved")
    place.symlink_to(tmp_path / "moved")
    with pytest.raises(NotADirectoryError):
        states.open(key)


async def removed(root: Path) -> None:
    """Waits until the remover has emptied its directory."""
    while os.listdir(root / ".removed"):  # noqa: PTH208
        await asyncio.sleep(0)


async def test_a_removed_directory_is_gone_at_once_and_follows_no_link(tmp_path: Path) -> None:
    states = StateDirs(tmp_path / "root")
    key, other = SessionKey("t", "s"), SessionKey("t", "s2")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    home = states.open(key) / HOME
    (home / "link").symlink_to(outside)
    (home / "file").touch()
    states.open(other)
    states.remove(key)
    assert not home.exists()
    assert not list((states.open(key) / HOME).iterdir())
    await removed(tmp_path / "root")
    assert (outside / "kept").exists()
    assert (states.open(other) / HOME).exists()
    states.remove(SessionKey("t", "unknown"))
    states.close()


async def test_a_sweep_removes_the_directories_of_sessions_that_are_gone(tmp_path: Path) -> None:
    states = StateDirs(tmp_path)
    kept, gone, twin = SessionKey("a", "s1"), SessionKey("a", "s2"), SessionKey("b", "s1")
    paths = {key: states.open(key) for key in (kept, gone, twin)}
    half_removed = tmp_path / ".removed" / "old"
    half_removed.mkdir(parents=True)
    foreign = tmp_path / "somebody" / "else"
    foreign.mkdir(parents=True)

    async def exists(key: SessionKey) -> bool:
        return key == kept

    await states.sweep(exists)
    assert [path.exists() for path in paths.values()] == [True, False, False]
    await removed(tmp_path)
    assert not half_removed.exists()
    assert foreign.exists()
    states.close()


async def test_a_store_that_does_not_answer_removes_nothing(tmp_path: Path) -> None:
    states = StateDirs(tmp_path)
    path = states.open(SessionKey("t", "s"))

    async def exists(key: SessionKey) -> bool:
        raise OSError("the store is away")

    await states.sweep(exists)
    assert path.exists()


async def test_a_server_with_another_store_removes_nothing(tmp_path: Path) -> None:
    path = StateDirs(tmp_path, "sqlite:///a.db").open(SessionKey("t", "s"))

    async def exists(key: SessionKey) -> bool:
        return False

    await StateDirs(tmp_path, "sqlite:///b.db").sweep(exists)
    assert path.exists()
    await StateDirs(tmp_path, "sqlite:///a.db").sweep(exists)
    assert not path.exists()


@pytest.mark.parametrize("ids", ["", "{}", "7", "[]", '["", "t"]', '["", 1, 2]', "\xff"])
async def test_ids_that_cannot_be_read_remove_nothing(tmp_path: Path, ids: str) -> None:
    states = StateDirs(tmp_path)
    path = states.open(SessionKey("t", "s"))
    (path / "session.json").write_text(ids, encoding="latin-1")

    async def exists(key: SessionKey) -> bool:
        return False

    await states.sweep(exists)
    assert path.exists()


async def test_ids_that_do_not_belong_to_the_directory_remove_nothing(tmp_path: Path) -> None:
    states = StateDirs(tmp_path)
    victim, forger = states.open(SessionKey("t", "victim")), states.open(SessionKey("t", "forger"))
    (forger / "session.json").write_text('["", "t", "victim"]')

    async def exists(key: SessionKey) -> bool:
        assert key.session_id == "victim"
        return True

    await states.sweep(exists)
    assert victim.exists()
    assert forger.exists()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", ["pipe", "link", "dangling link"])
async def test_a_trap_in_the_place_of_the_ids_catches_nothing(tmp_path: Path, what: str) -> None:
    states = StateDirs(tmp_path / "root")
    key = SessionKey("t", "s")
    (tmp_path / "victim").write_text("kept")
    ids = states.open(key) / "session.json"
    right = ids.read_bytes()
    ids.unlink()
    if what == "pipe":
        os.mkfifo(ids)
    else:
        ids.symlink_to(tmp_path / ("victim" if what == "link" else "created"))

    async def exists(key: SessionKey) -> bool:
        return True

    await states.sweep(exists)
    states.open(key)
    assert (ids.is_symlink(), ids.read_bytes()) == (False, right)
    assert (tmp_path / "victim").read_text() == "kept"
    assert not (tmp_path / "created").exists()
    states.close()
