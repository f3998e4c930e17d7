"""`LocalServer`, on the event loop of a test."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

import pytest

from runlane import Client, RunState
from runlane_server.agents.base import Turn
from runlane_server.config import Config
from runlane_server.core.errors import StartError
from runlane_server.core.limits import Limits
from runlane_server.testing.server import LocalServer
from support.staging import SECONDS, script

pytestmark = pytest.mark.sqlite("each test names the store it needs")


async def shout(turn: Turn) -> AsyncGenerator[str, None]:
    for word in turn.prompt.text.split():
        yield word.upper()


@pytest.mark.parametrize("agent", ["echo", shout])
async def test_a_client_reaches_it_over_tcp_and_a_unix_socket(
    agent: object, tmp_path: Path
) -> None:
    path = tmp_path / "s.sock"
    for listen in ("127.0.0.1:0", f"unix:{path}"):
        async with LocalServer(agent, listen=listen) as server, server.client() as client:  # type: ignore[arg-type]
            handle = await client.run_accepted("s", "hello", allow_missing=True)
            text = (await handle.completed(SECONDS)).text
            assert text == ("HELLO" if agent is shout else "hello")
            assert await server.coordinator.queued_prompts("s") == 0


async def test_it_starts_and_stops_within_half_a_second() -> None:
    async with LocalServer():
        pass
    begun = time.perf_counter()
    for _ in range(10):
        async with LocalServer(store="memory:"):
            pass
    assert (time.perf_counter() - begun) / 10 < 0.5


async def test_a_latch_holds_a_run_until_a_cancel_covers_it() -> None:
    async with LocalServer("scripted") as server, server.client() as client:
        handle = await client.run_accepted("s", script({"wait": "g"}), allow_missing=True)
        await server.gates.reached("g")
        later = await client.run_accepted("s", script({"text": "b"}))
        receipt = await client.cancel("s")
        assert [one.run_id for one in receipt.cancelled] == [handle.run_id, later.run_id]
        for one in (handle, later):
            assert (await one.completed(SECONDS)).state is RunState.CANCELLED


async def test_a_restart_keeps_the_address_and_the_runs(tmp_path: Path) -> None:
    config = Config(limits=replace(Limits(), max_active_runs=0), drain_timeout=0)
    server = LocalServer(store=f"sqlite:///{tmp_path / 'runlane.db'}", config=config)
    async with server, Client(server.address) as client:
        address = server.address
        handle = await client.run_accepted("s", "x", allow_missing=True)
        await server.restart()
        assert server.address == address
        assert (await client.get_run(handle.run_id)).state is RunState.ACCEPTED


async def test_an_active_run_does_not_delay_the_stop() -> None:
    begun = time.perf_counter()
    async with LocalServer("scripted") as server, server.client() as client:
        await client.run_accepted("s", script({"wait": "never"}), allow_missing=True)
        await server.gates.reached("never")
    assert time.perf_counter() - begun < SECONDS / 2


async def test_misuse_raises_an_error_with_the_reason() -> None:
    with pytest.raises(StartError, match="there is no agent"):
        await LocalServer("nobody").start()
    server = LocalServer()
    with pytest.raises(RuntimeError, match="is not running"):
        _ = server.address
    async with server:
        with pytest.raises(RuntimeError, match="already running"):
            await server.start()
