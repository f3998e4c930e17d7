"""Code of an agent that would end the server, or hold it, costs its own run only."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from runlane import Client, RunState
from runlane_server.config.settings import EVENT_LOOPS
from support.server import ServerProcess, serving
from support.staging import SECONDS

MODULE = """
import asyncio, sys, threading, time
from runlane_server.core.model import TextDelta

class Odd(BaseException):
    pass

class Rude(Exception):
    def __str__(self):
        sys.exit(7)
    __repr__ = __str__

async def leave(error):
    raise error

async def answer(turn):
    what = turn.prompt.text
    loop = asyncio.get_running_loop()
    yield "begun "
    if what == "task":
        await asyncio.create_task(leave(SystemExit(3)))
    if what == "task left alone":
        asyncio.create_task(leave(SystemExit(3)))
    if what == "task of a task":
        async def outer():
            await asyncio.gather(leave(KeyboardInterrupt()), asyncio.sleep(5))
        await asyncio.create_task(outer())
    if what == "group":
        async with asyncio.TaskGroup() as group:
            group.create_task(leave(SystemExit(3)))
    if what == "odd task":
        await asyncio.create_task(leave(Odd("odd")))
    if what == "callback":
        loop.call_soon(sys.exit, 3)
    if what == "timer":
        loop.call_later(0.01, sys.exit, 3)
    if what == "interrupting callback":
        loop.call_soon(leave_now)
    if what == "done callback":
        asyncio.create_task(asyncio.sleep(0)).add_done_callback(lambda _: sys.exit(3))
    if what == "thread":
        threading.Thread(target=sys.exit, args=(3,)).start()
    if what == "executor":
        await asyncio.to_thread(sys.exit, 3)
    if what == "rude":
        raise Rude
    if what == "finally":
        try:
            yield "more"
            raise ValueError("an error")
        finally:
            sys.exit(3)
    if what == "block":
        time.sleep(1.0)
    if what == "block in a callback":
        loop.call_soon(hold)
    await asyncio.sleep(0.05)
    yield "ended"

def hold():
    time.sleep(1.0)

def leave_now():
    raise KeyboardInterrupt

class Agent:
    starts = 0
    async def start(self):
        Agent.starts += 1
        if Agent.starts == 1:
            sys.exit(5)
        if Agent.starts == 2:
            raise asyncio.CancelledError
    async def run(self, turn):
        yield TextDelta("up")
    async def close(self):
        sys.exit(6)
"""


@asynccontextmanager
async def using(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str, agent: str = "answer"
) -> AsyncIterator[tuple[ServerProcess, Client]]:
    """A server whose agent is the module."""
    (folder / "fragile.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(folder))
    async with (
        serving(folder, "--agent", f"fragile:{agent}", "--log-format", "json", *flags) as server,
        Client(server.address) as client,
    ):
        yield server, client


async def run(client: Client, prompt: str, session_id: str = "s") -> tuple[RunState, str]:
    """Runs a prompt; returns the state, and the error's message or the text."""
    handle = await client.run_accepted(session_id, prompt, allow_missing=True)
    async with asyncio.timeout(SECONDS):
        complete = await handle.completed()
    return complete.state, complete.text if complete.error is None else complete.error.message


def lines(server: ServerProcess, event: str) -> list[dict[str, object]]:
    """The lines of the log about an event."""
    every = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    return [line for line in every if str(line["event"]).startswith(event)]


@pytest.mark.parametrize("loop", [name for name in EVENT_LOOPS if name != "auto"])
async def test_r24_exceptions_that_end_a_process_end_one_run_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    failing = {
        "task": "a task of the agent raised SystemExit: 3",
        "task of a task": "a task of the agent raised KeyboardInterrupt: ",
        "group": "ExceptionGroup",
        "odd task": "Odd: odd",
        "executor": "the agent raised SystemExit: 3",
        "rude": "Rude (its text could not be read)",
        "finally": "the agent raised SystemExit: 3",
    }
    harmless = (
        *("task left alone", "callback", "timer", "interrupting callback"),
        *("done callback", "thread"),
    )
    async with using(tmp_path, monkeypatch, "--event-loop", loop) as (server, client):
        other = await client.run_accepted("other", "wait", allow_missing=True)
        for prompt, message in failing.items():
            state, said = await run(client, prompt)
            assert state is RunState.FAILED, prompt
            assert message in said, prompt
        for prompt in harmless:
            assert await run(client, prompt) == (RunState.COMPLETED, "begun ended"), prompt
        assert (await other.completed()).state is RunState.COMPLETED
        assert not server.has_ended
        assert lines(server, "a callback tried to end the server")
        assert all("run_id" in line for line in lines(server, "a task of an agent tried"))
        assert await server.stop() == 0


async def test_r30_an_agent_that_exits_at_its_start_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with using(tmp_path, monkeypatch, agent="Agent") as (server, client):
        while (ended := await run(client, "x"))[0] is RunState.FAILED:
            assert "did not get ready" in ended[1]
        assert ended == (RunState.COMPLETED, "up")
        assert len(lines(server, "agent is not ready")) == 2
        assert await server.stop() == 0
        assert lines(server, "agent failed to close")


@pytest.mark.parametrize("loop", [name for name in EVENT_LOOPS if name != "auto"])
async def test_code_that_holds_the_event_loop_is_logged_with_its_run_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    flags = ("--event-loop", loop, "--metrics-listen", "127.0.0.1:0")
    async with using(tmp_path, monkeypatch, *flags) as (server, client):
        assert (await run(client, "quiet"))[0] is RunState.COMPLETED
        assert not lines(server, "event loop blocked")
        handle = await client.run_accepted("s", "block", allow_missing=True)
        assert (await handle.completed()).state is RunState.COMPLETED
        (blocked,) = lines(server, "event loop blocked")
        assert (blocked["level"], blocked["run_id"]) == ("warning", handle.run_id)
        assert "time.sleep(1.0)" in str(blocked["stack"])
        assert (await run(client, "block in a callback"))[0] is RunState.COMPLETED
        assert len(lines(server, "event loop blocked")) == 2
        (served,) = lines(server, "metrics served")
        page = await asyncio.to_thread(_read, str(served["url"]))
        assert "runlane_event_loop_blocked_total 2.0" in page


def _read(url: str) -> str:
    with urllib.request.urlopen(url) as answer:  # noqa: S310 - it is http
        text: str = answer.read().decode()
        return text
