"""Everything that a program started ends with its run, however it tried to get away."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runlane_server.agents.command import process_tree, program, run_cgroups
from runlane_server.agents.command.agent import CommandAgent
from support.processes import is_running, wait_for_exit
from support.programs import GRACE, answer, at_work, failure, python, shell
from support.turns import Working, ask

# Each prints the id of a process, and lets it run for an hour after `{then}`. The program learns
# through a pipe that the process is where it wants to be.
DOUBLE_FORK = """
import os, signal, sys, time
ready, notify = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        os.closerange(0, 3) if {silent} else None
        os.write(notify, b'%d' % os.getpid())
        time.sleep(3600)
    os._exit(0)
os.wait()
print(int(os.read(ready, 20)), flush=True)
{then}
"""
STUBBORN = """
import os, signal, time
ready, notify = os.pipe()
if os.fork() == 0:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    os.setpgid(0, 0)
    os.write(notify, b'%d' % os.getpid())
    time.sleep(3600)
print(int(os.read(ready, 20)), flush=True)
{then}
"""
WAIT = "time.sleep(3600)"
ESCAPES = {
    "a child that timeout(1) moved to a group": "timeout 3600 sh -c 'echo $$; exec sleep 3600'{sh}",
    "a job of a shell": "set -m; sleep 3600 & echo $!; {wait}",
    "a session of its own": "setsid sh -c 'echo $$; exec sleep 3600'{sh}",
    "a double fork": DOUBLE_FORK,
    "a child that ignores SIGTERM": STUBBORN,
}


def escaping(what: str, then: str = WAIT, *, grace: float = 0.2) -> CommandAgent:
    """An agent whose program starts such a process, and then waits or does something else."""
    code = ESCAPES[what]
    if code.startswith("\n"):
        return python(code.format(then=then, silent=False), grace=grace)
    return shell(code.format(sh="; echo not reached", wait="wait"), grace=grace)


async def started(working: Working) -> int:
    """The id of the process that the program started."""
    await working.said("\n")
    pid = int(working.text.split()[0])
    assert is_running(pid)
    return pid


@pytest.mark.parametrize("what", ESCAPES)
async def test_no_descendant_survives_a_cancel(what: str) -> None:
    async with at_work(escaping(what)) as working:
        pid = await started(working)
        await working.cancel()
        assert not is_running(pid)  # at the end of the turn, not some time later


@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize("code", [DOUBLE_FORK, STUBBORN])
async def test_no_descendant_survives_a_normal_completion(code: str, silent: bool) -> None:
    agent = python(code.format(then="", silent=silent))
    assert not is_running(int(await answer(agent)))


@pytest.mark.parametrize("then", ["os._exit(3)", "os.kill(os.getpid(), signal.SIGKILL)"])
async def test_no_descendant_survives_a_failure(then: str) -> None:
    async with at_work(escaping("a double fork", then)) as working:
        await asyncio.wait({working.task})
        # The program printed the id that its descendant had sent, so that one had started.
        assert not is_running(int(working.text))


async def test_a_process_that_forks_and_exits_without_end_is_caught(tmp_path: Path) -> None:
    count = tmp_path / "count"
    # Each generation has a session of its own and lives for a fraction of a millisecond.
    code = (
        "import os\n"
        "if os.fork() == 0:\n"
        "    while True:\n"
        "        os.setsid() if os.getpid() != os.getsid(0) else None\n"
        f"        file = os.open({str(count)!r}, os.O_CREAT | os.O_WRONLY | os.O_APPEND)\n"
        "        os.write(file, b'x'); os.close(file)\n"
        "        if os.fork(): os._exit(0)\n"
        "print('ready', flush=True)\n"
        "import time; time.sleep(3600)\n"
    )
    async with at_work(python(code, grace=0.1)) as working:
        await working.said("ready")
        while not count.exists() or count.stat().st_size < 20:
            await asyncio.sleep(0.001)
        await working.cancel()
    ended = count.stat().st_size
    assert not _alive_with(str(count))
    assert count.stat().st_size == ended


def _alive_with(word: str) -> list[int]:
    """The processes that have a word in their command line, except this one."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and word.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid() and is_running(pid)]


async def test_a_descendant_gets_sigterm_and_time_to_clean_up(tmp_path: Path) -> None:
    cleaned = tmp_path / "cleaned"
    # `timeout` moves to a group of its own; sh ends at SIGTERM at once.
    script = tmp_path / "worker.sh"
    script.write_text(
        f"trap 'sleep 0.1; echo ok > {cleaned}; exit' TERM\n"
        "echo ready; while :; do sleep 0.01; done\n"
    )
    agent = shell(f"timeout 3600 sh {script} & wait", grace=GRACE)
    async with at_work(agent) as working:
        await working.said("ready")
        await working.cancel()
    assert cleaned.read_text() == "ok\n"


# --- Out of reach: this is all that remains -----------------------------------------------------


async def test_a_process_that_another_one_starts_on_request_remains(tmp_path: Path) -> None:
    fifo = tmp_path / "requests"
    os.mkfifo(fifo)
    # As systemd, cron or a container engine would.
    service = await asyncio.create_subprocess_exec(
        *("sh", "-c", f"cat {fifo}; exec sleep 3600"), stdout=asyncio.subprocess.PIPE
    )
    assert await answer(shell(f"echo please > {fifo}")) == ""
    assert service.stdout is not None
    assert await service.stdout.readline() == b"please\n"
    assert is_running(service.pid)
    service.kill()
    await service.communicate()


async def test_a_program_that_kills_its_launcher_and_the_guardian_remains_without_cgroups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_cgroups, "own_cgroup", lambda: None)
    file = tmp_path / "pid"
    agent = shell(f"echo $$ > {file}; read guardian; kill -9 $guardian $PPID; exec sleep 3600")
    await agent.start()
    async with at_work(agent, f"{agent.programs.guardian.pid}\n") as working:
        await asyncio.wait({working.task})
        error = str(working.task.exception())
    assert error == "the process that watches the command was killed"
    pid = int(file.read_text())
    assert is_running(pid)
    os.kill(pid, signal.SIGKILL)


async def test_r33_a_program_that_kills_its_launcher_at_once_is_not_started_again(
    tmp_path: Path,
) -> None:
    file = tmp_path / "starts"
    agent = shell(f"kill -9 $PPID; echo started >> {file}")
    await agent.start()
    assert agent.programs.guardian.pid is not None
    # On one processor the program often acts before its launcher can report the start.
    os.sched_setaffinity(agent.programs.guardian.pid, {min(os.sched_getaffinity(0))})
    starts = 10
    for _ in range(starts):
        working = Working(agent, ask(""))
        await asyncio.wait({working.task})
        assert str(working.task.exception()) == "the process that watches the command was killed"
    await agent.close()
    assert len(file.read_text().splitlines()) <= starts


# --- Output after the exit --------------------------------------------------------------------


async def test_output_that_arrives_after_the_exit_is_kept() -> None:
    code = 'exec > >(while IFS= read -r line; do echo "[log] $line"; done); seq 2000; echo END'
    agent = CommandAgent(["bash", "-c", code], kill_grace=GRACE)
    lines = (await answer(agent)).splitlines()
    assert lines == [*(f"[log] {number}" for number in range(1, 2001)), "[log] END"]


async def test_processes_that_write_on_after_the_exit_fail_the_run() -> None:
    agent = shell("while :; do echo x; sleep 0.05; done & echo first")
    async with at_work(agent) as working:
        await asyncio.wait({working.task})
        error = working.task.exception()
        assert error is not None
        assert "still writing to its output 2 s later" in str(error)
        assert working.text.startswith("first\n") or "\nfirst\n" in working.text
        assert 20 <= working.text.count("x\n") <= 45  # for two seconds


async def test_an_exit_code_counts_more_than_what_was_left_behind() -> None:
    message = await failure(shell("while :; do echo x; sleep 0.05; done & exit 3"))
    assert message == "the command exited with code 3"


async def test_a_silent_process_delays_the_end_only_while_it_holds_the_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(program, "DRAIN_TIMEOUT", 3600.0)
    assert await answer(shell("sleep 3600 & echo done")) == "done\n"
    monkeypatch.setattr(program, "DRAIN_IDLE", 3600.0)
    assert await answer(shell("sleep 3600 >/dev/null & echo done")) == "done\n"


# --- The walk -----------------------------------------------------------------------------------


@pytest.fixture
def child() -> Iterator[int]:
    """A child of this process, which it can kill."""
    pid = os.fork()
    if pid == 0:
        signal.pause()
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_scan_of_all_processes_finds_the_same_children_as_the_kernel_s_list(child: int) -> None:
    assert process_tree.HAS_CHILDREN_FILES
    listed = process_tree._listed_children(os.getpid())
    assert child in listed
    assert sorted(process_tree._scanned_children(os.getpid())) == sorted(listed)
    assert process_tree.children_of(child) == []


def test_a_process_whose_id_belongs_to_another_by_now_is_not_signalled(child: int) -> None:
    process_tree._signal(child, signal.SIGKILL, {os.getpid() + 1})
    assert is_running(child)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)


async def test_spared_children_are_not_signalled() -> None:
    argv = (sys.executable, "-c", "import time; print(flush=True); time.sleep(3600)")
    pipe = asyncio.subprocess.PIPE
    spared = await asyncio.create_subprocess_exec(*argv, stdout=pipe)
    ended = await asyncio.create_subprocess_exec(*argv, stdout=pipe)
    others = set(process_tree.children_of(os.getpid())) - {ended.pid}
    process_tree.signal_descendants(signal.SIGKILL, spare=others)
    await wait_for_exit(ended.pid)
    assert is_running(spared.pid)
    spared.kill()
    await asyncio.gather(spared.wait(), ended.wait())
