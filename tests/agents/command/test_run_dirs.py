"""The private directories of programs: who owns them, and when they are removed."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from runlane_server.agents.command import run_dirs
from runlane_server.agents.command.agent import CommandAgent
from runlane_server.agents.command.removal import remove_tree
from runlane_server.agents.command.run_dirs import PREFIX, RunDirs
from runlane_server.core.errors import StartError
from runlane_server.core.model import TextDelta
from support.programs import GRACE, answer, at_work, failure, program, python, shell
from support.turns import ask

UNPRIVILEGED_USER = 65534

DEEP = 2500
"""Levels of directories: more than a path name, a recursion or open files reach."""


def inside(folder: Path) -> list[Path]:
    """All files and folders below a folder."""
    return sorted(folder.rglob("*"))


def runs_in(parent: Path) -> list[Path]:
    """The existing directories of runs."""
    return sorted(parent.glob(f"{PREFIX}*/*"))


async def test_a_run_has_an_empty_private_directory_that_is_removed_with_it(tmp_path: Path) -> None:
    agent = shell('pwd; echo "$HOME"; echo "$TMPDIR"; stat -c %a . ..; ls -A', directory=tmp_path)
    deltas: list[str] = [
        event.text async for event in agent.run(ask("")) if isinstance(event, TextDelta)
    ]
    where, *rest = "".join(deltas).splitlines()
    assert Path(where).parent.parent == tmp_path
    assert rest == [where, where, "700", "700"]  # and it is empty
    assert runs_in(tmp_path) == []
    await agent.close()
    assert inside(tmp_path) == []


async def test_concurrent_runs_have_separate_directories(tmp_path: Path) -> None:
    agent = shell("pwd; sleep 3600", directory=tmp_path)
    async with at_work(agent) as one, at_work(agent) as other:
        await one.said("\n")
        await other.said("\n")
        assert [Path(text.strip()) for text in sorted([one.text, other.text])] == runs_in(tmp_path)
        assert one.text != other.text
        await one.cancel()
        await other.cancel()


async def test_by_default_the_parent_is_the_directory_for_temporary_files() -> None:
    where = Path((await answer(shell("pwd"))).strip())
    assert where.parent.parent == Path(tempfile.gettempdir())
    assert not where.parent.exists()


async def test_the_files_of_a_program_are_removed_however_it_ended(tmp_path: Path) -> None:
    leaves = "mkdir -p a/b; echo x > a/b/c; ln -s / a/root; "
    assert await answer(shell(leaves, directory=tmp_path)) == ""
    await failure(shell(f"{leaves} exit 3", directory=tmp_path))
    ignores = f"trap '' TERM; {leaves} echo ready; while :; do sleep 1; done"
    for agent in (
        shell(f"{leaves} echo ready; sleep 3600", directory=tmp_path),
        shell(ignores, grace=0.1, directory=tmp_path),
    ):
        async with at_work(agent) as working:
            await working.said("ready")
            assert len(runs_in(tmp_path)) == 1
            await working.cancel()
            assert runs_in(tmp_path) == []


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A directory of an unprivileged user, whom the test runs as: permissions apply."""
    folder = Path(tempfile.mkdtemp())
    root = os.geteuid() == 0
    if root:
        os.chown(folder, UNPRIVILEGED_USER, UNPRIVILEGED_USER)
        os.seteuid(UNPRIVILEGED_USER)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        shutil.rmtree(folder, ignore_errors=True)


def test_read_only_files_are_removed_and_links_are_not_followed(unprivileged: Path) -> None:
    outside, run = unprivileged / "outside", unprivileged / "run"
    for folder in (outside, run / "cache" / "module"):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    (run / "link").symlink_to(outside)
    outside.chmod(0o555)
    for folder, mode in ((run / "cache" / "module", 0o000), (run / "cache", 0o555), (run, 0o555)):
        folder.chmod(mode)
    remove_tree(run)
    assert not run.exists()
    assert outside.stat().st_mode & 0o777 == 0o555
    assert (outside / "file").exists()


def make_deep(folder: Path, levels: int) -> None:
    """Creates a path of directories that is too long for any path name."""
    code = (
        f"import os\nfor n in range({levels}):\n"
        " os.mkdir('d')\n os.chdir('d')\n if n: os.chmod('..', 0o500)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


def test_a_tree_of_any_depth_and_width_is_removed_with_few_open_files(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in (".removed-0", ".removed-1", "wide"):
        (run / name / "inner").mkdir(parents=True)
    for number in range(2000):
        (run / "wide" / f"{number}").touch()
        (run / "wide" / f"d{number}").mkdir()
    make_deep(run, DEEP)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(file.name) for file in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, limits[1]))
    try:
        remove_tree(run)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert inside(tmp_path) == []


async def test_a_deep_directory_delays_neither_the_end_of_a_run_nor_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dirs = RunDirs(tmp_path)
    await dirs.start()
    deep = dirs.create()
    await asyncio.to_thread(make_deep, deep, DEEP)
    monkeypatch.setattr(run_dirs, "REMOVAL_TIMEOUT", 0.0)
    monkeypatch.setattr(run_dirs, "CLOSE_TIMEOUT", 60.0)
    await dirs.remove(deep)
    assert deep.exists()
    await dirs.close()
    assert inside(tmp_path) == []


async def test_a_deep_directory_of_a_killed_server_is_removed_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / f"{PREFIX}left"
    left.mkdir()
    await asyncio.to_thread(make_deep, left, DEEP)
    monkeypatch.setattr(run_dirs, "REMOVAL_TIMEOUT", 0.0)
    monkeypatch.setattr(run_dirs, "CLOSE_TIMEOUT", 60.0)
    dirs = RunDirs(tmp_path)
    await dirs.start()
    assert left.exists()
    await dirs.close()
    assert inside(tmp_path) == []


# --- Left over by a server -----------------------------------------------------------------------

SERVER = """
import asyncio, sys
from pathlib import Path
from runlane_server.agents.command.run_dirs import RunDirs

async def main():
    dirs = RunDirs(Path(sys.argv[1]))
    await dirs.start()
    (dirs.create() / "left").touch()
    print("ready", flush=True)
    sys.stdin.read()

asyncio.run(main())
"""


async def start_server(parent: Path) -> asyncio.subprocess.Process:
    """A process that holds the directory of a server, with one directory of a run."""
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SERVER, str(parent)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert server.stdout is not None
    assert await server.stdout.readline() == b"ready\n"
    return server


async def kill(server: asyncio.subprocess.Process) -> None:
    server.kill()
    await server.communicate()


async def test_the_next_server_removes_the_directories_of_a_killed_one(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    killed, living = await start_server(tmp_path), await start_server(tmp_path)
    assert len(runs_in(tmp_path)) == 2
    await kill(killed)
    dirs = RunDirs(tmp_path)
    await dirs.start()
    (left,) = runs_in(tmp_path)  # of the running server
    assert (left / "left").exists()
    await kill(living)
    again = RunDirs(tmp_path)
    await again.start()
    assert runs_in(tmp_path) == []
    assert len(inside(tmp_path)) == 3
    await again.close()
    await dirs.close()
    assert inside(tmp_path) == [other]


async def test_links_files_and_directories_of_other_users_are_not_removed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").touch()
    link, file = tmp_path / f"{PREFIX}link", tmp_path / f"{PREFIX}file"
    link.symlink_to(target)
    file.touch()
    theirs = tmp_path / f"{PREFIX}theirs"
    theirs.mkdir()
    if os.geteuid() == 0:
        os.chown(theirs, UNPRIVILEGED_USER, UNPRIVILEGED_USER)
    else:
        theirs.rmdir()  # only root can create one of another user
    before = inside(tmp_path)
    dirs = RunDirs(tmp_path)
    await dirs.start()
    await dirs.close()
    assert inside(tmp_path) == before


async def test_a_directory_that_another_server_removes_before_it_is_locked_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removed = fcntl.flock, list[Path]()

    def late(file: int, operation: int) -> None:
        if not removed:  # as if another server had swept it
            removed.extend(inside(tmp_path))
            removed[0].rmdir()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    dirs = RunDirs(tmp_path)
    await dirs.start()
    assert len(removed) == 1
    (own,) = inside(tmp_path)
    assert dirs.create().parent == own
    await dirs.close()


async def test_a_removed_directory_is_created_again(tmp_path: Path) -> None:
    dirs = RunDirs(tmp_path)
    await dirs.start()
    shutil.rmtree(inside(tmp_path)[0])
    assert dirs.create().parent.parent == tmp_path
    await dirs.close()
    assert inside(tmp_path) == []


async def test_a_missing_parent_is_created(tmp_path: Path) -> None:
    parent = tmp_path / "a" / "b"
    where = Path((await answer(shell("pwd", directory=parent))).strip())
    assert where.parent.parent == parent


def test_a_parent_that_cannot_be_created_fails_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match=r"--command-dir: .*file"):
        program("cat", directory=tmp_path / "file" / "dir")


async def test_a_run_without_a_directory_fails(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    agent = shell("pwd", directory=parent)
    parent.rmdir()
    assert (await failure(agent)).startswith("cannot create a directory for the run: ")


# --- Working directories ------------------------------------------------------------------------


async def test_a_relative_program_is_found_from_the_server_s_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "agent.sh"
    script.write_text('#!/bin/sh\necho "$0"\n')
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    assert await answer(program("./agent.sh")) == f"{tmp_path}/agent.sh\n"
    # A link stays a link: that of a virtual environment must not be resolved.
    (tmp_path / "link").symlink_to("agent.sh")
    monkeypatch.setenv("PATH", ".", prepend=os.pathsep)
    assert await answer(program("link")) == f"{tmp_path}/link\n"


async def test_programs_can_share_one_working_directory(tmp_path: Path) -> None:
    cwd = tmp_path / "project"
    cwd.mkdir()
    (cwd / "here").touch()
    agent = shell('pwd; ls; echo x > left; echo "$HOME"', cwd=cwd, directory=tmp_path)
    where, here, home = (await answer(agent)).splitlines()
    assert (where, here) == (str(cwd), "here")
    assert Path(home).parent.parent == tmp_path
    assert inside(cwd) == [cwd / "here", cwd / "left"]


async def test_a_relative_working_directory_is_that_of_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert await answer(shell("pwd", cwd=Path())) == f"{tmp_path}\n"
    assert runs_in(tmp_path) == []


async def test_relative_paths_in_the_arguments_are_logged_as_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "agent.py").touch()
    argv = ["cat", "agent.py", str(tmp_path / "agent.py"), "-u"]
    with capture_logs() as logged:
        CommandAgent(argv, kill_grace=GRACE)
    assert [line["arguments"] for line in logged] == [["agent.py"]]
    with capture_logs() as logged:
        program(*argv, cwd=tmp_path)
        python("agent.py and more")
    assert logged == []
