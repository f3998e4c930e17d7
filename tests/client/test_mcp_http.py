"""`runlane mcp --http`: tools over streamable HTTP, each call with the caller's own token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import httpx2
import pytest
from click.testing import CliRunner
from mcp import Client as Assistant
from mcp.client.streamable_http import streamable_http_client

from runlane.cli.app import runlane as cli
from runlane.cli.connection import Settings
from runlane.cli.mcp_server import door as mcp_door
from runlane.cli.mcp_server.door import MAX_BODY, PATH, opened
from runlane_server.testing import LocalServer
from runlane_web.guard import Policy
from runlane_web.serving import Address, bind, make_server
from support.assistant import accept, call, refused
from support.callers import guarded
from support.door import reason
from support.staging import SECONDS, say, wait

OWN = Policy(token="own-token-of-this-door")  # noqa: S106 - of tests
HELLO = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
ACCEPT = {"Accept": "application/json, text/event-stream"}


@asynccontextmanager
async def listening(target: str, policy: Policy) -> AsyncIterator[str]:
    """A door before the server at an address; yields its URL."""
    address = Address(port=0)
    (bound,) = bind(address)
    async with opened(Settings(target), policy, allow_answers=False, max_text=1000) as gateway:
        server = make_server(gateway, address)
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}{PATH}"
        finally:
            server.should_exit = server.force_exit = True
            await serving


@asynccontextmanager
async def assistant(
    url: str, token: str, mode: Literal["auto", "legacy"] = "auto"
) -> AsyncIterator[Assistant]:
    headers = {"Authorization": f"Bearer {token}"}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=SECONDS) as http,
        Assistant(streamable_http_client(url, http_client=http), mode=mode) as found,
    ):
        yield found


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_an_assistant_drives_a_server_over_http(mode: Literal["auto", "legacy"]) -> None:
    async with (
        LocalServer("scripted") as server,
        listening(server.address, OWN) as url,
        assistant(url, OWN.token, mode) as found,
    ):
        first = await accept(found, say("Good "), wait("go"), say("morning"))
        second = await accept(found, say("never"))
        said: list[str] = []
        heard = asyncio.Event()

        async def on_progress(progress: float, total: float | None, message: str | None) -> None:
            said.append(message or "")
            heard.set()

        following = asyncio.create_task(
            found.call_tool("follow_run", {"run_id": first}, progress_callback=on_progress)
        )
        await heard.wait()
        await call(found, "cancel_runs", run_id=second)
        server.gates.open("go")
        outcome = (await following).structured_content
        assert outcome is not None
        assert (outcome["ended"], outcome["text"]) == (True, "Good morning")
        assert said[0] == "attempt 1 started"
        forked = await call(found, "fork_session", session_id="s", new_session_id="copy")
        assert forked["session"]["session_id"] == "copy"


async def test_each_call_has_the_rights_of_its_own_token(tmp_path: Path) -> None:
    async with (
        guarded(tmp_path) as world,
        listening(world.wire.address, Policy()) as url,
        AsyncExitStack() as stack,
    ):
        reader, runner, stranger = [
            await stack.enter_async_context(assistant(url, world.texts[who]))
            for who in ("read", "run", "stranger")
        ]

        async def runs(who: Assistant) -> int:
            return len((await call(who, "list_runs"))["runs"])

        # At the same time, in turns, over one door: nobody gets the rights of another caller.
        for _ in range(5):
            seen = await asyncio.gather(*(runs(each) for each in (reader, stranger, runner)))
            assert seen == [1, 0, 1]
        accepted = {"session_id": "new", "prompt": "[]"}
        error, other, _ = await asyncio.gather(
            refused(reader, "accept_run", **accepted),
            refused(stranger, "show_run", run_id="r-theirs"),
            call(runner, "accept_run", **accepted),
        )
        assert "PERMISSION_DENIED" in error
        assert "RUN_NOT_FOUND" in other


async def post(url: str, headers: dict[str, str], **content: Any) -> httpx2.Response:
    async with httpx2.AsyncClient(timeout=SECONDS) as http:
        return await http.post(url, headers={**ACCEPT, **headers}, **(content or {"json": HELLO}))


async def test_a_request_that_may_not_call_is_refused() -> None:
    auth = {"Authorization": f"Bearer {OWN.token}"}
    async with LocalServer("scripted") as server, listening(server.address, OWN) as url:
        assert (await post(url, auth)).status_code == 200
        for headers, status, word in (
            ({}, 401, "UNAUTHENTICATED"),
            ({"Authorization": "Bearer another"}, 401, "UNAUTHENTICATED"),
            (auth | {"Host": "evil.example"}, 421, "HOST_NOT_ALLOWED"),
            (auth | {"Origin": "https://evil.example"}, 403, "ORIGIN_NOT_ALLOWED"),
        ):
            got = await post(url, headers)
            assert (got.status_code, reason(got)) == (status, word)
        got = await post(url, auth | {"Content-Type": "text/plain"}, content=b"{}")
        assert got.status_code == 415
        got = await post(url, auth, json={"a": "x" * MAX_BODY})
        assert got.status_code == 413
        async with httpx2.AsyncClient(headers=auth) as http:
            assert (await http.get(url)).status_code == 405
            # Nothing else of the gateway is served.
            assert (await http.get(url.replace(PATH, "/v1/agents"))).status_code == 404


async def test_a_token_that_the_server_does_not_know_is_refused_at_the_door(
    tmp_path: Path,
) -> None:
    async with guarded(tmp_path) as world, listening(world.wire.address, Policy()) as url:
        got = await post(url, {"Authorization": "Bearer invented"})
        assert (got.status_code, reason(got)) == (401, "UNAUTHENTICATED")
        assert got.headers["www-authenticate"] == "Bearer"


async def test_a_server_without_access_control_needs_a_token_of_the_door() -> None:
    async with LocalServer("scripted") as server, listening(server.address, Policy()) as url:
        got = await post(url, {"Authorization": "Bearer any"})
        assert (got.status_code, reason(got)) == (400, "SERVER_IS_OPEN")
        assert "--own-token-file" in got.text


async def test_calls_at_a_time_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_door, "MAX_CALLS", 2)
    async with (
        LocalServer("scripted") as server,
        listening(server.address, OWN) as url,
        assistant(url, OWN.token) as found,
    ):
        run_id = await accept(found, say("x"), wait("go"))
        heard = asyncio.Event()

        async def on_progress(progress: float, total: float | None, message: str | None) -> None:
            heard.set()

        following = asyncio.create_task(
            found.call_tool("follow_run", {"run_id": run_id}, progress_callback=on_progress)
        )
        await heard.wait()
        got = await post(url, {"Authorization": f"Bearer {OWN.token}"})
        assert (got.status_code, reason(got)) == (429, "OVERLOADED")
        server.gates.open("go")
        assert not (await following).is_error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--own-token-file", "x"], "--own-token-file: needs --http"),
        (["--allowed-host", "x"], "--allowed-host: needs --http"),
        (["--http", "0.0.0.0:80"], "is not 127.0.0.1:PORT"),
        (["--http", "127.0.0.1:99999"], "is not 127.0.0.1:PORT"),
        (["--http", "127.0.0.1:0", "--allowed-origin", "x"], "is not an origin"),
        (["--http", "127.0.0.1:0", "--own-token-file", "short"], "20 or more printable"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("short")
    result = CliRunner().invoke(cli, ["mcp", *arguments])
    assert result.exit_code == 2
    assert words in result.output


def test_a_token_of_the_command_is_refused_where_assistants_send_theirs() -> None:
    result = CliRunner(env={"RUNLANE_TOKEN": "x"}).invoke(cli, ["mcp", "--http", "127.0.0.1:0"])
    assert result.exit_code == 2
    assert "each assistant sends its own token" in result.output
