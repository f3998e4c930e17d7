"""A program is limited before it begins, and an exceeded limit names itself."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import fields

import pytest

from runlane_server.agents.base import AgentError
from runlane_server.agents.command.limits import CPU_GRACE, ResourceLimits
from runlane_server.agents.command.programs import COMMAND_LIMIT
from support.programs import answer, at_work, failure, program, python, shell

KINDS = {
    "cpu": resource.RLIMIT_CPU,
    "memory": resource.RLIMIT_AS,
    "files": resource.RLIMIT_NOFILE,
    "processes": resource.RLIMIT_NPROC,
    "file_size": resource.RLIMIT_FSIZE,
}

PRINT_LIMITS = (
    "import json, resource\n"
    f"kinds = {[*KINDS.values(), resource.RLIMIT_CORE]}\n"
    "print(json.dumps([resource.getrlimit(kind) for kind in kinds]))\n"
)


async def limits_of_a_program(limits: ResourceLimits) -> list[tuple[int, int]]:
    """The soft and hard limits of a program: the kinds above, in order, then core dumps."""
    found: list[list[int]] = json.loads(await answer(python(PRINT_LIMITS, limits=limits)))
    return [(soft, hard) for soft, hard in found]


def own_limits() -> list[tuple[int, int]]:
    """The limits of this process, of the kinds above."""
    return [resource.getrlimit(kind) for kind in KINDS.values()]


async def test_by_default_only_core_dumps_are_limited() -> None:
    assert await limits_of_a_program(ResourceLimits()) == [*own_limits(), (0, 0)]


async def test_every_limit_applies_to_the_program_alone() -> None:
    before = own_limits()
    limits = ResourceLimits(cpu=60, memory=1 << 32, files=77, processes=5000, file_size=1 << 20)
    assert [field.name for field in fields(limits)] == list(KINDS)
    assert await limits_of_a_program(limits) == [
        (60, 60 + CPU_GRACE),
        (1 << 32, 1 << 32),
        (77, 77),
        (5000, 5000),
        (1 << 20, 1 << 20),
        (0, 0),
    ]
    assert own_limits() == before


async def test_no_limit_exceeds_the_server_s_own() -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert most != resource.RLIM_INFINITY
    found = await limits_of_a_program(ResourceLimits(files=most + 1))
    assert found[list(KINDS).index("files")] == (most, most)


CPU = ResourceLimits(cpu=1)


async def test_exceeding_the_cpu_limit_fails_the_run_with_that_reason() -> None:
    message = await failure(python("while True: pass", limits=CPU), COMMAND_LIMIT)
    assert message == "the command was ended by its limit of 1 s of CPU time (--command-cpu)"


async def test_a_child_that_exceeds_the_cpu_limit_fails_the_run_with_that_reason() -> None:
    code = f"echo half >&2; '{sys.executable}' -c 'while True: pass'; exit $?"
    message = await failure(shell(code, limits=CPU), COMMAND_LIMIT)
    assert message.startswith(
        "the command exited with code 152: a child of it reached its limit of 1"
    )
    assert "(--command-cpu): half" in message


async def test_a_program_that_ignores_the_cpu_limit_is_killed() -> None:
    code = (
        "import signal\n"
        "signal.signal(signal.SIGXCPU, lambda *_: print('cleaning up', flush=True))\n"
        "while True: pass\n"
    )
    async with at_work(python(code, limits=CPU)) as working:
        await working.said("cleaning up")
        with pytest.raises(AgentError, match=r"by SIGKILL, possibly for exceeding its limit"):
            await working.task


async def test_exceeding_the_file_size_limit_fails_the_run_with_that_reason() -> None:
    # Two writes: the first one ends exactly at the limit.
    argv = ["dd", "if=/dev/zero", "of=file", "bs=4096", "count=2", "status=none"]
    agent = program(*argv, limits=ResourceLimits(file_size=4096))
    message = await failure(agent, COMMAND_LIMIT)
    limit = "its limit of 4096 bytes in a file (--command-file-size)"
    assert message == f"the command was ended by {limit}"


async def test_without_a_limit_the_same_signals_and_codes_name_none() -> None:
    assert await failure(shell("kill -XCPU $$")) == "the command was ended by SIGXCPU"
    assert await failure(shell("exit 153")) == "the command exited with code 153"
    assert await failure(shell("kill -KILL $$")) == "the command was ended by SIGKILL"
    assert await failure(shell("exit 3", limits=CPU)) == "the command exited with code 3"


async def test_the_memory_and_open_file_limits_are_enforced() -> None:
    limits = ResourceLimits(memory=512 << 20, files=16)
    assert (await failure(python("bytearray(1 << 30)", limits=limits))).endswith("MemoryError")
    code = "found = [open('/dev/null') for _ in range(20)]"
    assert "Too many open files" in await failure(python(code, limits=limits))
