"""The guardian ends the programs of a killed server."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from runlane_server.agents.command.agent import CommandAgent
from runlane_server.agents.command.guardian import Guardian
from runlane_server.agents.command.program import Program
from support.processes import is_running, wait_for_exit
from support.turns import Working, ask

NO_GROUP = (1 << 22) + 1
"""Greater than any process id."""

SERVER = """
import asyncio, sys
sys.path[:0] = {path!r}
from support.turns import ask
from runlane_server.agents.command.agent import CommandAgent

async def main():
    agent = CommandAgent(["sh", "-c", {code!r}], kill_grace=0.1)
    await agent.start()
    async for event in agent.run(ask("")):
        print(event.text, end="", flush=True)

asyncio.run(main())
"""


async def test_the_programs_of_a_killed_server_are_ended() -> None:
    code = "trap '' TERM; sh -c 'echo $$; exec sleep 3600' & echo $$; wait"
    server = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        SERVER.format(path=sys.path, code=code),
        stdout=asyncio.subprocess.PIPE,
    )
    assert server.stdout is not None
    pids = [int(await server.stdout.readline()) for _ in range(2)]
    assert all(is_running(pid) for pid in pids)
    server.kill()
    await server.wait()
    for pid in pids:
        await wait_for_exit(pid)


async def test_a_guardian_that_was_killed_is_replaced() -> None:
    agent = CommandAgent(["sh", "-c", "echo $$; sleep 3600"], kill_grace=30.0)
    await agent.start()
    first = agent._guardian._process
    assert first is not None
    first.kill()
    first.wait()
    working = Working(agent, ask(""))
    await working.said("\n")
    second = agent._guardian._process
    assert second is not None
    assert second.pid != first.pid
    assert is_running(second.pid)
    await working.cancel()
    await agent.close()
    assert not is_running(second.pid)


async def test_a_guardian_that_does_not_read_is_replaced() -> None:
    guardian = Guardian(grace=30.0)
    guardian.start()
    first = guardian._process
    assert first is not None
    os.kill(first.pid, signal.SIGSTOP)
    for _ in range(1 << 16):
        guardian.watch(NO_GROUP)
        guardian.unwatch(NO_GROUP)
        if guardian._process is not first:
            break
    second = guardian._process
    assert second is not None
    assert second is not first
    assert not is_running(first.pid)
    await guardian.close()
    assert not is_running(second.pid)


async def test_a_new_guardian_knows_the_groups_of_the_old_one() -> None:
    program = Program(["sleep", "3600"], env=os.environ, stdin=b"")
    guardian = Guardian(grace=0.1)
    guardian.start()
    guardian.watch(program.group)
    first = guardian._process
    assert first is not None
    first.kill()
    first.wait()
    guardian.watch(NO_GROUP)
    # As when a server is killed: the kernel closes the pipe, and no group was unwatched.
    await guardian.close()
    assert await program.exit_code() == -signal.SIGTERM
    await program.end(30.0)


async def test_end_waits_for_the_exit_after_sigkill_too() -> None:
    ended: list[int] = []
    argv = ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"]
    program = Program(argv, env=os.environ, stdin=b"", on_exit=ended.append)
    assert await program.read() == b"ready\n"
    await program.end(grace=0.1)
    assert ended == [program.group]
