"""The private directories of programs: whose they are, and how they go."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from runlane_server.agents.command.agent import CommandAgent
from runlane_server.agents.command.run_dirs import PREFIX, RunDirs, _remove
from runlane_server.core.errors import StartError
from support.programs import GRACE, answer, at_work, failure, program, python, shell
from support.turns import ask

NOBODY = 65534


def inside(folder: Path) -> list[Path]:
    """All that is in a folder, and in those in it."""
    return sorted(folder.rglob("*"))


def runs_in(parent: Path) -> list[Path]:
    """The directories of runs that there are."""
    return sorted(parent.glob(f"{PREFIX}*/*"))


async def test_a_run_works_in_a_private_directory_that_goes_with_it(tmp_path: Path) -> None:
    agent = shell('pwd; echo "$HOME"; echo "$TMPDIR"; stat -c %a . ..; ls -A', directory=tmp_path)
    said: list[str] = [event.text async for event in agent.run(ask("")) if hasattr(event, "text")]
    where, *rest = "".join(said).splitlines()
    assert Path(where).parent.parent == tmp_path
    assert rest == [where, where, "700", "700"]  # and nothing is in it
    assert runs_in(tmp_path) == []
    await agent.close()
    assert inside(tmp_path) == []


async def test_each_run_has_its_own(tmp_path: Path) -> None:
    agent = shell("pwd; sleep 3600", directory=tmp_path)
    async with at_work(agent) as one, at_work(agent) as other:
        await one.said("\n")
        await other.said("\n")
        assert [Path(text.strip()) for text in sorted([one.text, other.text])] == runs_in(tmp_path)
        assert one.text != other.text
        await one.cancel()
        await other.cancel()


async def test_without_a_parent_it_is_among_the_temporary_files() -> None:
    where = Path((await answer(shell("pwd"))).strip())
    assert where.parent.parent == Path(tempfile.gettempdir())
    assert not where.parent.exists()


async def test_what_a_program_leaves_goes_too_however_it_ended(tmp_path: Path) -> None:
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
def as_nobody() -> Iterator[Path]:
    """A directory of the user that the test now is, who is not root: permissions bind."""
    folder = Path(tempfile.mkdtemp())
    root = os.geteuid() == 0
    if root:
        os.chown(folder, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        shutil.rmtree(folder, ignore_errors=True)


def test_what_is_read_only_is_removed_and_links_are_not_followed(as_nobody: Path) -> None:
    outside, run = as_nobody / "outside", as_nobody / "run"
    for folder in (outside, run / "cache" / "module"):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    (run / "link").symlink_to(outside)
    outside.chmod(0o555)
    for folder, mode in ((run / "cache" / "module", 0o000), (run / "cache", 0o555), (run, 0o555)):
        folder.chmod(mode)
    _remove(run)
    assert not run.exists()
    assert outside.stat().st_mode & 0o777 == 0o555
    assert (outside / "file").exists()


# --- What a server leaves -----------------------------------------------------------------------

SERVER = """
import asyncio, sys
from pathlib import Path
from runlane_server.agents.command.run_dirs import RunDirs

async def main():
    dirs = RunDirs(Path(sys.argv[1]))
    await dirs.start()
    (dirs.make() / "left").touch()
    print("ready", flush=True)
    sys.stdin.read()

asyncio.run(main())
"""


async def start_server(parent: Path) -> asyncio.subprocess.Process:
    """A process that has the directory of a server, and one of a run in it."""
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


async def test_the_next_server_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    killed, living = await start_server(tmp_path), await start_server(tmp_path)
    assert len(runs_in(tmp_path)) == 2
    await kill(killed)
    dirs = RunDirs(tmp_path)
    await dirs.start()
    (left,) = runs_in(tmp_path)  # that of the server that lives
    assert (left / "left").exists()
    await kill(living)
    again = RunDirs(tmp_path)
    await again.start()
    assert runs_in(tmp_path) == []
    assert len(inside(tmp_path)) == 3
    await again.close()
    await dirs.close()
    assert inside(tmp_path) == [other]


async def test_what_only_looks_like_a_leftover_stays(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").touch()
    link, file = tmp_path / f"{PREFIX}link", tmp_path / f"{PREFIX}file"
    link.symlink_to(target)
    file.touch()
    theirs = tmp_path / f"{PREFIX}theirs"
    theirs.mkdir()
    if os.geteuid() == 0:
        os.chown(theirs, NOBODY, NOBODY)
    else:
        theirs.rmdir()  # nobody else's can be made
    before = inside(tmp_path)
    dirs = RunDirs(tmp_path)
    await dirs.start()
    await dirs.close()
    assert inside(tmp_path) == before


async def test_a_directory_that_is_taken_for_a_leftover_before_it_is_locked_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removed = fcntl.flock, list[Path]()

    def late(file: int, operation: int) -> None:
        if not removed:  # as if another server was quicker, and went on
            removed.extend(inside(tmp_path))
            removed[0].rmdir()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    dirs = RunDirs(tmp_path)
    await dirs.start()
    assert len(removed) == 1
    (own,) = inside(tmp_path)
    assert dirs.make().parent == own
    await dirs.close()


async def test_a_directory_that_somebody_cleaned_up_is_made_again(tmp_path: Path) -> None:
    dirs = RunDirs(tmp_path)
    await dirs.start()
    shutil.rmtree(inside(tmp_path)[0])
    assert dirs.make().parent.parent == tmp_path
    await dirs.close()
    assert inside(tmp_path) == []


async def test_a_parent_that_is_not_there_is_made(tmp_path: Path) -> None:
    parent = tmp_path / "a" / "b"
    where = Path((await answer(shell("pwd", directory=parent))).strip())
    assert where.parent.parent == parent


def test_a_parent_that_cannot_be_made_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match=r"--command-dir: .*file"):
        program("cat", directory=tmp_path / "file" / "dir")


async def test_without_a_directory_the_run_fails(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    agent = shell("pwd", directory=parent)
    parent.rmdir()
    assert (await failure(agent)).startswith("cannot make a directory for the run: ")


# --- Elsewhere ----------------------------------------------------------------------------------


async def test_a_program_is_found_from_where_the_server_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "agent.sh"
    script.write_text('#!/bin/sh\necho "$0"\n')
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    assert await answer(program("./agent.sh")) == f"{tmp_path}/agent.sh\n"
    # So it is through a link, as that of a virtual environment, which has to stay what it is.
    (tmp_path / "link").symlink_to("agent.sh")
    monkeypatch.setenv("PATH", ".", prepend=os.pathsep)
    assert await answer(program("link")) == f"{tmp_path}/link\n"


async def test_all_may_work_in_one_directory(tmp_path: Path) -> None:
    cwd = tmp_path / "project"
    cwd.mkdir()
    (cwd / "here").touch()
    agent = shell('pwd; ls; echo x > left; echo "$HOME"', cwd=cwd, directory=tmp_path)
    where, here, home = (await answer(agent)).splitlines()
    assert (where, here) == (str(cwd), "here")
    assert Path(home).parent.parent == tmp_path
    assert inside(cwd) == [cwd / "here", cwd / "left"]
    assert runs_in(tmp_path) == []


async def test_arguments_that_a_program_will_not_find_are_told_of(
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
