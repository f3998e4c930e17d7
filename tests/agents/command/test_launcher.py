"""How a program is started: with its limits, its three pipes, its own argv, and no shell."""

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

TELLS = (
    "import json, resource\n"
    f"kinds = {[*KINDS.values(), resource.RLIMIT_CORE]}\n"
    "print(json.dumps([resource.getrlimit(kind) for kind in kinds]))\n"
)


async def bounds(limits: ResourceLimits) -> list[tuple[int, int]]:
    """What a program is bound to: the kinds above, in order, and core dumps."""
    found: list[list[int]] = json.loads(await answer(python(TELLS, limits=limits)))
    return [(soft, hard) for soft, hard in found]


def own() -> list[tuple[int, int]]:
    """What this process is bound to, of the kinds above."""
    return [resource.getrlimit(kind) for kind in KINDS.values()]


async def test_no_limit_is_set_but_that_there_is_no_core_dump() -> None:
    assert await bounds(ResourceLimits()) == [*own(), (0, 0)]


async def test_every_limit_is_set_for_the_program_alone() -> None:
    before = own()
    limits = ResourceLimits(cpu=60, memory=1 << 32, files=77, processes=5000, file_size=1 << 20)
    assert [field.name for field in fields(limits)] == list(KINDS)
    assert await bounds(limits) == [
        (60, 60 + CPU_GRACE),
        (1 << 32, 1 << 32),
        (77, 77),
        (5000, 5000),
        (1 << 20, 1 << 20),
        (0, 0),
    ]
    assert own() == before


async def test_no_limit_is_raised_above_that_of_the_server() -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert most != resource.RLIM_INFINITY
    found = await bounds(ResourceLimits(files=most + 1))
    assert found[list(KINDS).index("files")] == (most, most)


CPU = ResourceLimits(cpu=1)


async def test_too_much_cpu_time_fails_the_run_and_says_so() -> None:
    message = await failure(python("while True: pass", limits=CPU), COMMAND_LIMIT)
    assert message == "the command was ended by its limit of 1 s of CPU time (--command-cpu)"


async def test_so_it_does_where_a_part_of_it_took_too_much() -> None:
    code = f"echo half >&2; '{sys.executable}' -c 'while True: pass'; exit $?"
    message = await failure(shell(code, limits=CPU), COMMAND_LIMIT)
    assert message.startswith(
        "the command exited with code 152, as a part of it met its limit of 1"
    )
    assert message.split(": ", 1)[1].startswith("half")


async def test_a_program_that_goes_on_beyond_its_cpu_time_is_killed() -> None:
    code = (
        "import signal\n"
        "signal.signal(signal.SIGXCPU, lambda *_: print('tidying up', flush=True))\n"
        "while True: pass\n"
    )
    async with at_work(python(code, limits=CPU)) as working:
        await working.said("tidying up")
        with pytest.raises(
            AgentError, match=r"by SIGKILL, as one is that goes on beyond its limit"
        ):
            await working.task


async def test_a_file_that_grows_too_large_fails_the_run_and_says_so() -> None:
    # In two writes: the first one is cut at the limit.
    argv = ["dd", "if=/dev/zero", "of=file", "bs=4096", "count=2", "status=none"]
    agent = program(*argv, limits=ResourceLimits(file_size=4096))
    message = await failure(agent, COMMAND_LIMIT)
    limit = "its limit of 4096 bytes in a file (--command-file-size)"
    assert message == f"the command was ended by {limit}"


async def test_the_same_signal_without_a_limit_blames_none() -> None:
    assert await failure(shell("kill -XCPU $$")) == "the command was ended by SIGXCPU"
    assert await failure(shell("exit 153")) == "the command exited with code 153"
    assert await failure(shell("kill -KILL $$")) == "the command was ended by SIGKILL"
    assert await failure(shell("exit 3", limits=CPU)) == "the command exited with code 3"


async def test_memory_and_files_run_out() -> None:
    limits = ResourceLimits(memory=512 << 20, files=16)
    assert (await failure(python("bytearray(1 << 30)", limits=limits))).endswith("MemoryError")
    code = "found = [open('/dev/null') for _ in range(20)]"
    assert "Too many open files" in await failure(python(code, limits=limits))


# --- No shell, and nothing besides ---------------------------------------------------------------

WORDS = ["$(touch injected)", "`id`", "a b", "", "*", ";", "\n", "é", "'\"", "\\", "-x", "\udcff"]


async def test_the_words_of_the_argv_are_handed_on_as_they_are() -> None:
    code = "import sys; print([ascii(word) for word in sys.argv[1:]])"
    said = await answer(program(sys.executable, "-X", "utf8", "-c", code, *WORDS))
    assert said == f"{[ascii(word) for word in WORDS]}\n"


async def test_the_spec_is_split_into_words_and_nothing_in_it_is_expanded() -> None:
    spec = r"command:printf '%s|' $HOME '$(id)' `id` * \; a\ b '>' x;y && z"
    agent = load_agent(spec)
    said = "".join([event.text async for event in agent.run(ask("")) if hasattr(event, "text")])
    await agent.close()
    assert said == "$HOME|$(id)|`id`|*|;|a b|>|x;y|&&|z|"


async def test_a_prompt_goes_in_as_it_is_and_becomes_no_word(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    prompt = f"$(touch {touched}) `touch {touched}`; touch {touched}\n'\"\r\0\\ \x1b é -x\n\n"
    assert await answer(program("cat"), ask(prompt)) == prompt
    assert await answer(program("sh", "-c", "cat; echo $#"), ask(prompt)) == f"{prompt}0\n"
    argv = await answer(program("cat", "/proc/self/cmdline"), ask(prompt))
    assert argv.split("\0")[1:] == ["/proc/self/cmdline", ""]
    assert not touched.exists()


def files_of(pid: int) -> dict[str, str]:
    """The file descriptors of a process, with what they are."""
    return {file.name: str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir()}


async def test_nothing_is_inherited_but_the_three_pipes() -> None:
    # What a library opens without care is open in every program that does not see to it.
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


async def test_no_signal_is_ignored_or_blocked() -> None:
    status = await answer(program("cat", "/proc/self/status"))
    masks = dict(line.split(":\t") for line in status.splitlines() if line.startswith("Sig"))
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM, signal.SIGINT):
        for mask in ("SigIgn", "SigBlk"):
            assert not int(masks[mask], 16) & 1 << (number - 1), (mask, number.name)


async def test_a_program_is_itself_and_not_a_child_of_something() -> None:
    async with at_work(shell("echo $$ $PPID.; sleep 3600")) as working:
        await working.said(".")
        pid, parent = (int(word) for word in working.text.strip(".\n").split())
        assert parent == os.getpid()
        assert os.getpgid(pid) == pid
