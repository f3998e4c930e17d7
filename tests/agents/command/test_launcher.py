"""A program starts with its three pipes and its exact argv, without a shell."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from runlane_server.agents.base import AgentError
from runlane_server.agents.command import programs
from runlane_server.agents.loader import load_agent
from runlane_server.core.model import TextDelta
from support.programs import answer, at_work, program, python, shell
from support.turns import Working, ask, collect

WORDS = ["$(touch injected)", "`id`", "a b", "", "*", ";", "\n", "é", "'\"", "\\", "-x", "\udcff"]


async def test_the_words_of_the_argv_are_passed_unchanged() -> None:
    code = "import sys; print([ascii(word) for word in sys.argv[1:]])"
    said = await answer(program(sys.executable, "-X", "utf8", "-c", code, *WORDS))
    assert said == f"{[ascii(word) for word in WORDS]}\n"


async def test_the_spec_is_split_into_words_without_expansion() -> None:
    spec = r"command:printf '%s|' $HOME '$(id)' `id` * \; a\ b '>' x;y && z"
    agent = load_agent(spec)
    said = "".join(
        [event.text async for event in agent.run(ask("")) if isinstance(event, TextDelta)]
    )
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


async def test_the_launcher_is_the_parent_and_leads_nothing_of_the_program() -> None:
    async with at_work(shell("echo $$ $PPID.; sleep 3600")) as working:
        await working.said(".")
        pid, launcher = (int(word) for word in working.text.strip(".\n").split())
        assert os.getpgid(pid) == os.getsid(pid) == pid
        assert os.getsid(launcher) not in {pid, os.getsid(0)}
        if os.geteuid() == 0:  # others may not look into the launcher: it is not dumpable
            assert files_of(launcher).keys() >= {"0", "1", "2"}
            # None of the run's pipes is kept: the end of the output must show.
            assert not set(files_of(pid).values()) & set(files_of(launcher).values())


async def test_the_launcher_adopts_orphans() -> None:
    code = (
        "import os\n"
        "launcher = os.getppid()\n"
        "ready, notify = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork(): os._exit(0)\n"
        "    while os.getppid() != launcher: pass\n"
        "    os.write(notify, b'adopted')\n"
        "    os._exit(0)\n"
        "os.close(notify)\n"
        "print(os.read(ready, 99).decode())\n"
    )
    assert await answer(python(code)) == "adopted\n"


@pytest.mark.parametrize("env", ["LC_CTYPE=C", "LC_CTYPE=C.UTF-8", ""])
async def test_the_interpreter_of_the_launcher_adds_no_variable(
    env: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter of this process sets it where there is no locale.
    monkeypatch.delenv("LC_CTYPE", raising=False)
    found = await answer(program("/usr/bin/env", env=[env] if env else []))
    assert [line for line in found.splitlines() if line.startswith("LC_CTYPE")] == [env][: len(env)]


# --- Scarcity ---------------------------------------------------------------------------------


@contextmanager
def no_free_descriptors() -> Iterator[None]:
    """This process can open no file."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(opened) + 20, limits[1]))
    try:
        with suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for file in opened:
            os.close(file)


async def test_a_start_without_free_descriptors_is_retried() -> None:
    agent = shell("cat")
    await agent.start()
    with capture_logs() as logged:
        with no_free_descriptors():
            working = Working(agent, ask("hi"))
            while not (logged or working.task.done()):  # until the first attempt has failed
                await asyncio.sleep(0)
        await working.task
    assert working.text == "hi"
    assert logged[0]["error"] == "Too many open files"
    await agent.close()


async def test_a_start_that_never_succeeds_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "START_PATIENCE", 0.3)
    agent = shell("cat")
    await agent.start()
    with (
        no_free_descriptors(),
        pytest.raises(AgentError, match=r"cannot start .*/sh: Too many open files"),
    ):
        await collect(agent, ask(""))
    await agent.close()


async def test_a_guardian_out_of_descriptors_is_retried() -> None:
    agent = shell("cat")
    await agent.start()
    guardian = agent.programs.guardian.pid
    assert guardian is not None
    limits = resource.prlimit(guardian, resource.RLIMIT_NOFILE)
    resource.prlimit(guardian, resource.RLIMIT_NOFILE, (7, limits[1]))
    with capture_logs() as logged:
        working = Working(agent, ask("hi"))
        while not (logged or working.task.done()):
            await asyncio.sleep(0)
        resource.prlimit(guardian, resource.RLIMIT_NOFILE, limits)
        await working.task
    assert working.text == "hi"
    await agent.close()
