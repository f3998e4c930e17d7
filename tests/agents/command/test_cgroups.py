"""The control group of a run ends what its process tree cannot reach, where there are groups."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runlane_server.agents.command import run_cgroups
from runlane_server.agents.command.agent import CommandAgent
from runlane_server.agents.command.cgroup import (
    join_cgroup,
    kill_cgroup,
    remove_cgroup,
)
from runlane_server.agents.command.run_dirs import PREFIX
from support.processes import is_running, wait_for_exit
from support.programs import answer, at_work, python, shell
from support.turns import ask, collect, texts


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A group below which servers have theirs."""
    own = run_cgroups.own_cgroup()
    if own is None:
        pytest.skip("this process may not create cgroups (v2)")
    parent = own / f"test-{os.getpid()}"
    parent.mkdir()
    try:
        if not run_cgroups.can_be_ended(parent):
            pytest.skip("this kernel has no cgroup.kill")
        monkeypatch.setattr(run_cgroups, "own_cgroup", lambda: parent)
        yield parent
    finally:
        while not run_cgroups.RunCgroups.end_soon(str(parent)):
            pass  # it has been killed


def groups_in(group: Path) -> list[Path]:
    """The groups right below a group."""
    return [path for path in group.iterdir() if path.is_dir()]


def group_of(pid: int) -> str:
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next(line for line in lines if line.startswith("0::"))


@contextmanager
def a_process_in(group: Path) -> Iterator[int]:
    """A process of this one that is moved into a group."""
    with subprocess.Popen(["sleep", "3600"]) as sleeper:
        (group / "cgroup.procs").write_text(str(sleeper.pid))
        try:
            yield sleeper.pid
        finally:
            sleeper.kill()


# Its launcher is the parent of the program, and the guardian the parent of the launcher.
KILLS_ITS_KEEPERS = """
import os, signal, time
launcher = os.getppid()
guardian = int(open(f"/proc/{launcher}/stat").read().rpartition(")")[2].split()[1])
if os.fork() == 0:
    os.setsid()
    os.write(1, b"%d" % os.getpid())
    os.closerange(0, 3)
    os.kill(guardian, signal.SIGKILL)
    os.kill(launcher, signal.SIGKILL)
    time.sleep(3600)
time.sleep(3600)
"""


async def test_a_program_that_kills_launcher_and_guardian_is_ended_with_its_run(
    parent: Path,
) -> None:
    agent = python(KILLS_ITS_KEEPERS)
    await agent.start()
    async with at_work(agent) as working:
        await asyncio.wait({working.task})
        assert "the process that watches the command was killed" in str(working.task.exception())
        assert not is_running(int(working.text))
    assert groups_in(parent) == []


async def test_a_run_has_a_group_that_goes_with_it(parent: Path) -> None:
    agent = shell("grep ^0:: /proc/self/cgroup")
    await agent.start()
    server = groups_in(parent)[0]
    first, second = [Path("".join(texts(await collect(agent, ask(""))))) for _ in range(2)]
    assert first != second
    assert first.parent.name == second.parent.name == server.name
    assert groups_in(server) == []
    await agent.close()
    assert groups_in(parent) == []


async def test_a_cancel_ends_a_process_in_a_group_below_that_of_its_run(parent: Path) -> None:
    code = """
import os, pathlib, sys, time
below = next(pathlib.Path(sys.argv[1]).glob("run-*")) / "below"
below.mkdir()
(below / "cgroup.procs").write_text("0")
print(os.getpid(), flush=True)
time.sleep(3600)
"""
    agent = CommandAgent([sys.executable, "-c", code, ""], kill_grace=0.1)
    await agent.start()
    server = groups_in(parent)[0]
    agent.programs.argv[-1] = str(server)
    async with at_work(agent) as working:
        await working.said("\n")
        pid = int(working.text)
        assert group_of(pid).endswith("/below")
        await working.cancel()
        assert not is_running(pid)
        assert groups_in(server) == []


async def test_the_next_start_ends_what_a_server_left_that_was_killed_with_its_launchers(
    parent: Path,
) -> None:
    group = parent / f"{PREFIX}killed"
    run = group / "run-1" / "made by the program"
    run.mkdir(parents=True)
    with a_process_in(run) as pid:
        agent = shell("true", grace=0.1)
        await agent.start()
        own = next(each for each in groups_in(parent) if each != group)
        await wait_for_exit(pid)
        await asyncio.gather(*agent.programs.guardian.cgroups._clearing)
        assert groups_in(parent) == [own]
        assert await answer(agent) == ""


SERVER = """
import asyncio, sys
sys.path[:0] = {path!r}
from support.turns import ask
from runlane_server.agents.command.agent import CommandAgent

async def main():
    agent = CommandAgent(["sh", "-c", "echo $$; exec sleep 3600"], kill_grace=0.1)
    await agent.start()
    async for event in agent.run(ask("")):
        print(event.text, end="", flush=True)

asyncio.run(main())
"""


async def test_the_launcher_of_a_killed_server_ends_the_whole_group(parent: Path) -> None:
    """One process of the group is not a descendant of the launcher."""
    code = SERVER.format(path=sys.path)
    server = await asyncio.create_subprocess_exec(
        *("sh", "-c", f'echo $$ > {parent}/cgroup.procs; exec "$@"', "sh"),
        *(sys.executable, "-c", code),
        stdout=asyncio.subprocess.PIPE,
    )
    assert server.stdout is not None
    pid = int(await server.stdout.readline())
    [own] = groups_in(parent)
    [run] = groups_in(own)
    with a_process_in(run) as other:
        assert group_of(other) == group_of(pid)
        server.kill()
        await server.wait()
        await wait_for_exit(pid)
        await wait_for_exit(other)


async def test_the_group_of_a_running_server_is_left_alone(parent: Path) -> None:
    one, two = shell("echo $$; sleep 3600"), shell("true", grace=0.0)
    await one.start()
    async with at_work(one) as working:
        await working.said("\n")
        await two.start()
        assert two.programs.guardian.cgroups._clearing == set()
        assert is_running(int(working.text))
        await two.close()
    assert groups_in(parent) == []


async def test_a_program_runs_without_a_group_if_none_can_be_created(
    parent: Path,
) -> None:
    agent = shell("echo hi")
    await agent.start()
    own = groups_in(parent)[0]
    (own / "cgroup.max.descendants").write_text("0")
    assert await answer(agent) == "hi\n"


MOUNTS = [
    "24 1 0:22 / /proc rw - proc proc rw",
    "30 24 0:26 /system.slice /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
]


@pytest.mark.parametrize(
    ("groups", "found"),
    [
        (["0::/system.slice/runlane.service"], Path("/sys/fs/cgroup/runlane.service")),
        (["4:memory:/a", "0::/system.slice"], Path("/sys/fs/cgroup")),
        (["0::/user.slice"], None),
        (["0::/../other"], None),
        (["4:memory:/system.slice"], None),
    ],
    ids=["below", "hybrid", "outside of the mount", "outside of the namespace", "version 1 only"],
)
def test_the_own_group_is_found_below_its_mount(groups: list[str], found: Path | None) -> None:
    assert run_cgroups._find(groups, MOUNTS) == found


def test_a_group_that_is_gone_is_no_error(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    join_cgroup(gone)
    kill_cgroup(gone)
    assert remove_cgroup(gone)
