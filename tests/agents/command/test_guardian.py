"""The guardian ends the programs of a killed server, and survives attacks on itself."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runlane_server.agents.command import program
from runlane_server.agents.command.agent import CommandAgent
from runlane_server.agents.command.guardian import Guardian
from runlane_server.agents.command.launcher import Command
from runlane_server.agents.command.program import Program
from support.processes import is_running, wait_for_exit
from support.programs import answer, failure, shell
from support.staging import SECONDS
from support.turns import Working, ask

SERVER = """
import asyncio, sys
sys.path[:0] = {path!r}
from support.turns import ask
from runlane_server.agents.command import program
from runlane_server.agents.command.agent import CommandAgent

async def main():
    agent = CommandAgent(["sh", "-c", {code!r}], kill_grace=0.1)
    await agent.start()
    print(agent.programs.guardian.pid, flush=True)
    async for event in agent.run(ask("")):
        print(event.text, end="", flush=True)

asyncio.run(main())
"""

ESCAPES = (
    "trap '' TERM\n"
    "setsid sh -c 'echo $$; exec sleep 3600' &\n"
    "timeout 3600 sh -c 'echo $$; trap : TERM; while :; do sleep 1; done' &\n"
    "echo $$; wait"
)
"""Prints the ids of three processes: in a session and in a group of their own, and itself."""


@pytest.mark.parametrize("first", ["server", "guardian"])
async def test_the_programs_of_a_killed_server_are_ended(first: str) -> None:
    server = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        SERVER.format(path=sys.path, code=ESCAPES),
        stdout=asyncio.subprocess.PIPE,
    )
    assert server.stdout is not None
    guardian, *pids = [int(await server.stdout.readline()) for _ in range(4)]
    assert all(is_running(pid) for pid in pids)
    if first == "guardian":
        os.kill(guardian, signal.SIGKILL)
        await wait_for_exit(guardian)
    server.kill()
    await server.wait()
    for pid in (*pids, guardian):
        await wait_for_exit(pid)


async def test_a_run_survives_the_guardian_and_the_next_one_gets_another(tmp_path: Path) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    agent = shell(f"echo ready; cat {fifo}")
    await agent.start()
    working = Working(agent, ask(""))
    await working.said("ready")
    first = agent.programs.guardian.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await wait_for_exit(first)
    fifo.write_text("done")
    await working.task
    assert working.text == "ready\ndone"
    await answer(shell("true"))
    assert "ready" in await _answer_open(agent, fifo)
    second = agent.programs.guardian.pid
    assert second not in {None, first}
    await agent.close()
    assert not is_running(second or 0)


async def _answer_open(agent: CommandAgent, fifo: Path) -> str:
    working = Working(agent, ask(""))
    await working.said("ready")
    await asyncio.to_thread(fifo.write_text, "")
    await working.task
    return working.text


async def test_the_guardian_kills_what_a_killed_launcher_leaves() -> None:
    agent = shell("echo $PPID $$; setsid sh -c 'echo $$.; exec sleep 3600' & wait")
    working = Working(agent, ask(""))
    await working.said(".")
    launcher, *pids = (int(word) for word in working.text.rstrip(".\n").split())
    os.kill(launcher, signal.SIGKILL)
    for pid in pids:
        await wait_for_exit(pid)
    await asyncio.wait({working.task})
    assert "the process that watches the command was killed" in str(working.task.exception())
    await agent.close()


async def test_a_launcher_that_a_program_stops_does_not_hold_the_run() -> None:
    agent = shell("setsid sleep 3600 & echo $!; echo $$ $PPID.; wait", grace=0.1)
    working = Working(agent, ask(""))
    await working.said(".")
    *pids, launcher = (int(word) for word in working.text.rstrip(".\n").split())
    os.kill(launcher, signal.SIGSTOP)
    await working.cancel()
    for pid in pids:
        await wait_for_exit(pid)
    await agent.close()


async def test_a_program_that_stops_its_launcher_at_once_harms_its_own_run_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(program, "START_TIMEOUT", 0.5)
    file = tmp_path / "pid"
    agent = shell(f"echo $$ > {file}; kill -STOP $PPID; exec sleep 3600", grace=0.1)
    working = Working(agent, ask(""))
    # The launcher is stopped before it reports the start, or soon after.
    await asyncio.wait({working.task}, timeout=1)
    await working.cancel()
    await wait_for_exit(int(await asyncio.to_thread(file.read_text)))
    assert is_running(agent.programs.guardian.pid or 0)
    await agent.close()


async def test_a_guardian_that_a_program_stops_is_replaced() -> None:
    agent = shell("cat")
    await agent.start()
    first = agent.programs.guardian.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    assert await answer(agent, ask("hi")) == "hi"
    assert not is_running(first)


async def test_a_guardian_that_does_not_read_is_replaced() -> None:
    guardian = Guardian(grace=30.0)
    guardian.start()
    first = guardian.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    null = os.open(os.devnull, os.O_RDWR)
    try:
        for _ in range(1 << 12):
            guardian.launch([null] * 5)
            if guardian.pid != first:
                break
    finally:
        os.close(null)
    second = guardian.pid
    assert second not in {None, first}
    assert not is_running(first)
    await guardian.close()
    assert not is_running(second or 0)


WITHOUT_PRIVILEGES = """
import ctypes, os, resource, signal
from runlane_server.agents.command.guardian import Guardian

version_3, nothing = (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capset(version_3, nothing) == 0
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
guardian = Guardian(grace=30.0)
guardian.start()
first = guardian.pid
os.kill(first, signal.SIGSTOP)
null = os.open(os.devnull, os.O_RDWR)
sent = 0
while guardian.pid == first:
    guardian.launch([null] * 5)
    sent += 5
guardian.stop()
print(sent)
"""


def test_a_guardian_that_does_not_read_is_replaced_when_the_user_is_not_root() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_PRIVILEGES],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 100, "the buffer was full before the limit of files was reached"


async def test_end_waits_for_the_exit_after_sigkill_too() -> None:
    argv = ["/bin/sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"]
    guardian = Guardian(grace=30.0)
    stubborn = Program(guardian, Command(argv, os.environ, "/", grace=30.0), stdin=b"")
    pid = await stubborn.started()
    assert await stubborn.read() == b"ready\n"
    await stubborn.end(grace=0.1)
    assert not is_running(pid)
    assert await stubborn.exit_code() == -signal.SIGKILL
    await guardian.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may read it: it is not dumpable")
async def test_the_guardian_has_no_variable_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    guardian = Guardian(grace=30.0)
    guardian.start()
    environ = Path(f"/proc/{guardian.pid}/environ")
    assert await asyncio.to_thread(environ.read_bytes) == b""
    await guardian.close()


async def test_a_missing_working_directory_fails_the_run(tmp_path: Path) -> None:
    agent = shell("true", cwd=tmp_path / "none")
    assert (await failure(agent)).endswith("/sh: No such file or directory")
