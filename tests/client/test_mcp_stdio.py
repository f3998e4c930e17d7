"""`runlane mcp` as a process, with the client of the package `mcp` over stdio."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import httpx2
import pytest
import pytest_asyncio
from mcp import Client as Assistant
from mcp import StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CallToolResult

from runlane_server.access import tokens
from runlane_server.config import Config
from runlane_server.testing import LocalServer
from support.assistant import accept, call, refused
from support.server import clean_environment
from support.staging import SECONDS, open_latch, say, wait


@pytest_asyncio.fixture
async def server() -> AsyncIterator[LocalServer]:
    async with LocalServer("scripted") as server:
        yield server


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_an_assistant_drives_a_server_over_stdio(
    server: LocalServer, mode: Literal["auto", "legacy"]
) -> None:
    command = StdioServerParameters(
        command=sys.executable,
        args=["-m", "runlane", "mcp"],
        env=clean_environment() | {"RUNLANE_SERVER": server.address},
    )
    async with Assistant(command, mode=mode) as assistant:
        first = await accept(assistant, say("Good "), wait("go"), say("morning"))
        second = await accept(assistant, say("never"))
        said: list[str] = []
        heard = asyncio.Event()

        async def on_progress(progress: float, total: float | None, message: str | None) -> None:
            said.append(message or "")
            heard.set()

        async def follow() -> CallToolResult:
            return await assistant.call_tool(
                "follow_run", {"run_id": first}, progress_callback=on_progress
            )

        following = asyncio.create_task(follow())
        await heard.wait()
        cancelled = await call(assistant, "cancel_runs", run_id=second)
        assert [run["run_id"] for run in cancelled["receipt"]["cancelled"]] == [second]
        await accept(assistant, open_latch("go"), session="other")
        outcome = (await following).structured_content
        assert outcome is not None
        assert (outcome["ended"], outcome["text"]) == (True, "Good morning")
        assert said[0] == "attempt 1 started"
        assert "Good" in "".join(said)
        assert said[-1].endswith("completed")


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("", (0, "", "")),
        (
            "import sys; sys.modules['mcp'] = None; ",
            (1, "", "Error: mcp is not installed; run: pip install 'runlane[mcp]'\n"),
        ),
    ],
    ids=["ends with its stdin", "not installed"],
)
def test_the_command_says_nothing_on_stdout(program: str, outcome: tuple[int, str, str]) -> None:
    """Anything else on stdout would be taken for a message."""
    command = (sys.executable, "-c", f"{program}from runlane.cli import main; main()", "mcp")
    ended = subprocess.run(
        command, input="", capture_output=True, text=True, check=False, env=clean_environment()
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == outcome


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_while_it_reads_stdin(end: signal.Signals) -> None:
    hello = {
        "protocolVersion": "2025-11-25",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "1"},
    }
    message = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello}
    command = (sys.executable, "-m", "runlane", "mcp")
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean_environment()
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
        assert '"serverInfo"' in process.stdout.readline()
        process.send_signal(end)
        assert process.wait(SECONDS) == -end


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_the_command_that_serves_http(
    server: LocalServer, tmp_path: Path, end: signal.Signals
) -> None:
    (tmp_path / "own").write_text("own-token-of-this-door")
    options = ("--http", "127.0.0.1:0", "--own-token-file", str(tmp_path / "own"))
    command = (sys.executable, "-m", "runlane", "-S", server.address, "mcp", *options)
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, env=clean_environment()
    )
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    url = line.removeprefix("runlane mcp listening on ").strip()
    headers = {"Authorization": "Bearer own-token-of-this-door"}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=SECONDS) as http,
        Assistant(streamable_http_client(url, http_client=http)) as assistant,
    ):
        assert (await call(assistant, "list_runs"))["runs"] == []
    process.send_signal(end)
    assert await process.wait() == {signal.SIGINT: 0, signal.SIGTERM: -signal.SIGTERM}[end]
    assert await process.stdout.read() == b""


async def test_http_before_a_server_without_access_control_warns_at_the_start(
    server: LocalServer,
) -> None:
    command = (sys.executable, "-m", "runlane", "-S", server.address, "mcp", "--http")
    process = await asyncio.create_subprocess_exec(
        *command,
        "127.0.0.1:0",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=clean_environment(),
    )
    assert process.stderr is not None
    async with asyncio.timeout(SECONDS):
        line = (await process.stderr.readline()).decode()
    assert line.startswith("runlane mcp: warning: every request will be refused: the server has no")
    assert "--own-token-file" in line
    process.send_signal(signal.SIGINT)
    out, err = await process.communicate()
    assert (out.count(b"\n"), err, process.returncode) == (1, b"", 0)


async def test_the_role_of_the_token_of_the_command_holds_for_the_assistant(tmp_path: Path) -> None:
    token, token_id, digest = tokens.make()
    file, access = tmp_path / "token", tmp_path / "access.toml"
    file.write_text(token)
    entry = {"name": "ann", "tenant": "acme", "role": "read", "id": token_id, "sha256": digest}
    lines = [f'{key} = "{value}"' for key, value in entry.items()]
    access.write_text("\n".join(["[[token]]", *lines]))
    access.chmod(0o600)
    config = Config(drain_timeout=0, access=str(access))
    async with LocalServer("scripted", config=config) as server:
        command = StdioServerParameters(
            command=sys.executable,
            args=["-m", "runlane", "-S", server.address, "--token-file", str(file), "mcp"],
            env=clean_environment(),
        )
        async with Assistant(command) as assistant:
            assert (await call(assistant, "list_runs"))["runs"] == []
            error = await refused(assistant, "accept_run", session_id="s", prompt="x")
            assert "PERMISSION_DENIED" in error
            file.write_text("another")  # the file is read again for each call
            error = await refused(assistant, "list_runs")
            assert "UNAUTHENTICATED" in error
            assert token not in error
