"""What the README shows is what happens."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import Mapping
from pathlib import Path

import pytest

from agents.openai_server import OpenAIServer
from e2e.process import SECONDS, ServerProcess, serving
from runlane import Client

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)

DEFAULT = "127.0.0.1:50051"
SERVER = ".venv/bin/runlane-server "


def block(language: str, containing: str) -> str:
    """The one block of a language that contains this."""
    (found,) = (text for kind, text in BLOCKS if kind == language and containing in text)
    return str(found)


async def done(folder: Path, server: ServerProcess, *argv: str) -> str:
    """What a program prints that has to succeed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "RUNLANE_SERVER": server.address}
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=PIPE, stdout=PIPE, stderr=STDOUT, cwd=folder, env=env
    )
    async with asyncio.timeout(2 * SECONDS):
        out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    return out.decode()


async def test_the_python_example(tmp_path: Path) -> None:
    example = block("python", "async with Client(")
    assert DEFAULT in example
    async with serving(tmp_path, "--agent", "echo") as server:
        code = example.replace(DEFAULT, server.address)
        said = await done(tmp_path, server, sys.executable, "-c", code)
    assert said == "What is new?\ncompleted: stop\n"


async def test_the_python_example_without_asyncio(tmp_path: Path) -> None:
    example = block("python", "from runlane.sync import Client")
    async with serving(tmp_path, "--agent", "echo") as server:
        code = example.replace(DEFAULT, server.address)
        said = await done(tmp_path, server, sys.executable, "-c", code)
    assert said.splitlines()[-1] == "What is new?"


async def test_the_first_commands(tmp_path: Path) -> None:
    commands = block("sh", '"Hello, Runlane"')
    lines = [line for line in commands.splitlines() if not line.startswith("runlane watch")]
    assert len(lines) == len(commands.splitlines()) - 1  # that one does not end by itself
    async with serving(tmp_path, "--agent", "echo") as server:
        said = await done(tmp_path, server, "bash", "-ec", "\n".join(lines))
    assert "Hello, Runlane\n" in said
    # The answer, its prompt and itself in the transcript, and the prompt of the run.
    assert said.count("one two three\n") == 4
    assert said.count("\tdemo\t") == 2


async def test_the_commands_that_show_the_queue_and_the_cancel(tmp_path: Path) -> None:
    commands = block("sh", "runlane cancel demo")
    (flags,) = (flags for flags in servers() if "--agent echo:" in shlex.join(flags))
    async with serving(tmp_path, *flags) as server:
        # In a script nobody looks after what goes on in the background.
        said = await done(tmp_path, server, "bash", "-ec", f"{commands}\nwait")
    assert "this one waits behind it" in said
    assert re.search(r"^fence [12] in session demo$", said, re.MULTILINE)
    assert "\tassistant\tcancelled\t" in said


def servers() -> list[list[str]]:
    """The flags of every server that is started by hand."""
    lines = (line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines())
    return [shlex.split(line)[1:] for line in lines if line.startswith(SERVER)]


ANSWERS: Mapping[str, str] = {
    "echo:delay=500ms": "one two",
    "command:tr a-z A-Z": "ONE TWO",
    "chat:openai:my-model": "one two ",
    "my_agent:answer": "ONE TWO ",
}


def test_every_server_is_tried() -> None:
    assert [flags for flags in servers() if flags[0] == "--agent"] == servers()
    assert {flags[1] for flags in servers()} == set(ANSWERS)


@pytest.mark.parametrize("agent", [agent for agent in ANSWERS if not agent.startswith("echo")])
async def test_the_agents(tmp_path: Path, agent: str) -> None:
    (tmp_path / "my_agent.py").write_text(block("python", "# my_agent.py"))
    async with OpenAIServer().serving() as model:
        exports = re.search(r"^export (.*)$", block("sh", "chat:"), re.MULTILINE)
        assert exports is not None
        env = dict(each.split("=", 1) for each in shlex.split(exports[1]))
        assert set(env) == {"OPENAI_BASE_URL", "OPENAI_API_KEY"}
        env["OPENAI_BASE_URL"] = env["OPENAI_BASE_URL"].replace(":8000", f":{model.port}")
        (flags,) = (flags for flags in servers() if flags[1] == agent)
        async with serving(tmp_path, *flags, env=env) as server, Client(server.address) as client:
            handle = await client.run_accepted("s", "one two", allow_missing=True)
            assert (await handle.completed(SECONDS)).text == ANSWERS[agent]


async def test_the_tests_of_others(tmp_path: Path) -> None:
    (tmp_path / "test_backend.py").write_text(block("python", "runlane_sync_client"))
    (tmp_path / "test_coroutine.py").write_text(block("python", "import LocalServer"))
    async with serving(tmp_path) as server:
        command = (sys.executable, "-m", "pytest", "-o", "asyncio_mode=auto")
        assert "2 passed" in await done(tmp_path, server, *command)


async def test_the_server_for_a_harness(tmp_path: Path) -> None:
    line = block("sh", "--harness").strip()
    address = shlex.split(line)[shlex.split(line).index("--listen") + 1]
    assert f"runlane-conformance {address}`" in README.read_text()
    flags = shlex.split(line.replace(f"--listen {address} ", ""))[1:]
    async with serving(tmp_path, *flags) as server:
        command = ("runlane-conformance", server.address, "--rule", "10-13")
        assert "4 rules: 4 passed" in await done(tmp_path, server, *command)
