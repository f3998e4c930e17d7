"""A program starts with its limits, its three pipes and its exact argv, without a shell."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from runlane_server.agents.base import AgentError
from runlane_server.agents.command.agent import COMMAND_LIMIT
from runlane_server.agents.command.launcher import CPU_GRACE, ResourceLimits
from runlane_server.agents.loader import load_agent
from support.programs import answer, at_work, failure, program, python, shell
from support.turns import ask

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


# --- No shell, nothing inherited ----------------------------------------------------------------

WORDS = ["$(touch injected)", "`id`", "a b", "", "*", ";", "\n", "é", "'\"", "\\", "-x", "\udcff"]


async def test_the_words_of_the_argv_are_passed_unchanged() -> None:
    code = "import sys; print([ascii(word) for word in sys.argv[1:]])"
    said = await answer(program(sys.executable, "-X", "utf8", "-c", code, *WORDS))
    assert said == f"{[ascii(word) for word in WORDS]}\n"


async def test_the_spec_is_split_into_words_without_expansion() -> None:
    spec = r"command:printf '%s|' $HOME '$(id)' `id` * \; a\ b '>' x;y && z"
    agent = load_agent(spec)
    said = "".join([event.text async for event in agent.run(ask("")) if hasattr(event, "text")])
    await agent.close()
    assert said == "$HOME|$(id)|`id`|*|;|a b|>|x;y|&&|z|"


async def test_a_prompt_reaches_stdin_unchanged_and_never_the_argv(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    prompt = f"$(touch {touched}) `touch {touched}`; touch {touched}\n'\"\r\0\\ \x1b é -x\n\n"
    assert await answer(program("cat"), ask(prompt)) == prompt
    assert await answer(program("sh", "-c", "cat; echo $#"), ask(prompt)) == f"{prompt}0\n"
    argv = await answer(program("cat", "/proc/self/cmdline"), ask(prompt))
    assert argv.split("\0")[1:] == ["/proc/self/cmdline", ""]
    assert not touched.exists()


def files_of(pid: int) -> dict[str, str]:
    """The file descriptors of a process, and what each refers to."""
    return {file.name: str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir()}


async def test_only_the_three_pipes_are_inherited() -> None:
    # A library may open files that are inheritable.
    leaked = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(leaked, True)
    try:
        async with at_work(shell("echo $$.; sleep 3600")) as working:
            await working.said(".")
            pid = int(working.text.strip(".\n"))
            found = files_of(pid)
            assert sorted(found) == ["0", "1", "2"]
            assert all(what.startswith("pipe:") for what in found.values())
    finally:
        os.close(leaked)


async def test_a_program_starts_with_no_signal_ignored_or_blocked() -> None:
    status = await answer(program("cat", "/proc/self/status"))
    masks = dict(line.split(":\t") for line in status.splitlines() if line.startswith("Sig"))
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM, signal.SIGINT):
        for mask in ("SigIgn", "SigBlk"):
            assert not int(masks[mask], 16) & 1 << (number - 1), (mask, number.name)


async def test_a_program_is_a_direct_child_of_the_server() -> None:
    async with at_work(shell("echo $$ $PPID.; sleep 3600")) as working:
        await working.said(".")
        pid, parent = (int(word) for word in working.text.strip(".\n").split())
        assert parent == os.getpid()
        assert os.getpgid(pid) == pid
