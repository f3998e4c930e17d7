"""Files in directories that programs can write to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runlane_server.agents.program_files import NewFiles, read_file, replace_file

LIMIT = 10


def plant(path: Path, what: str) -> Path:
    """Puts something in a place of the server; returns a file that must stay as it is."""
    victim = path.parent.parent / "victim"
    victim.write_bytes(b"kept")
    match what:
        case "pipe":
            os.mkfifo(path)
        case "link":
            path.symlink_to(victim)
        case "dangling link":
            path.symlink_to(victim.with_name("created"))
        case "hard link":
            path.hardlink_to(victim)
        case "directory":
            path.mkdir()
        case "large file":
            path.write_bytes(b"x" * (LIMIT + 1))
        case "device":
            path.symlink_to("/dev/zero")
    return victim


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory that a program can write to."""
    path = tmp_path / "place"
    path.mkdir()
    return path


@pytest.mark.parametrize(
    "what", ["nothing", "pipe", "link", "dangling link", "directory", "large file", "device"]
)
def test_only_a_regular_file_of_limited_size_is_read(place: Path, what: str) -> None:
    plant(place / "file", what)
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    with pytest.raises(OSError, match="file"):
        read_file(place / "file", LIMIT)
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


@pytest.mark.parametrize(
    "what", ["nothing", "pipe", "link", "dangling link", "hard link", "large file", "device"]
)
def test_a_file_replaces_whatever_lies_there(place: Path, what: str) -> None:
    victim = plant(place / "file", what)
    replace_file(place / "file", b"x" * LIMIT)
    assert read_file(place / "file", LIMIT) == b"x" * LIMIT
    assert victim.read_bytes() == b"kept"
    assert sorted(one.name for one in place.parent.iterdir()) == ["place", "victim"]
    assert [one.name for one in place.iterdir()] == ["file"]
    assert (place / "file").stat().st_mode & 0o777 == 0o600


def test_a_failed_replacement_leaves_nothing(place: Path) -> None:
    plant(place / "file", "directory")
    with pytest.raises(IsADirectoryError):
        replace_file(place / "file", b"x")
    assert [one.name for one in place.iterdir()] == ["file"]


@pytest.mark.parametrize("part", ["parent", "grandparent"])
def test_a_directory_that_is_a_link_is_not_entered(place: Path, part: str) -> None:
    inner = place / "session"
    inner.mkdir()
    (inner / "file").touch()
    linked = {"parent": inner, "grandparent": place}[part]
    linked.rename(moved := place.parent / "moved")
    linked.symlink_to(moved)
    with pytest.raises(NotADirectoryError):
        read_file(inner / "file", LIMIT)
    with pytest.raises(NotADirectoryError):
        replace_file(inner / "file", b"x")
    assert (moved / ("file" if part == "parent" else "session/file")).read_bytes() == b""


@pytest.mark.parametrize("what", ["pipe", "link", "dangling link", "hard link", "large file"])
def test_a_new_file_replaces_nothing(place: Path, what: str) -> None:
    files = NewFiles(place)
    victim = plant(files.path / "file", what)
    with pytest.raises(FileExistsError):
        files.write("file", b"x")
    assert files.write("other", b"y").read_bytes() == b"y"
    assert victim.read_bytes() == b"kept"


def test_new_files_stay_in_the_directory_that_was_made_for_them(place: Path) -> None:
    files = NewFiles(place)
    files.path.rename(place / "moved")
    (elsewhere := place.parent / "elsewhere").mkdir()
    files.path.symlink_to(elsewhere)
    files.write("file", b"x")
    assert not list(elsewhere.iterdir())
    assert (place / "moved" / "file").read_bytes() == b"x"
