"""Servers with the scripted agent, and what tests do with their own client."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from polyglot.program import SECONDS
from runlane import Client, CursorCompacted, RunState
from runlane.v1 import run_service_pb2, run_service_pb2_grpc
from runlane_server.access import editing
from runlane_server.access.caller import DEFAULT_TENANT, Role
from runlane_server.config import Config
from runlane_server.testing import LocalServer
from support.server import ServerProcess, serving

SCRIPTED = ("--store", "sqlite:///runlane.db", "--agent", "scripted")

RUN_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
"""A UUIDv7 (RFC 9562, section 5.7)."""


@asynccontextmanager
async def scripted(folder: Path) -> AsyncIterator[tuple[LocalServer, Client]]:
    """A server whose agent executes its prompt as a script, and a client of it.

    It runs in this process: a process of its own takes longer to start than most tests take.
    """
    async with (
        LocalServer("scripted", store=f"sqlite:///{folder}/runlane.db") as server,
        Client(server.address) as client,
    ):
        yield server, client


@asynccontextmanager
async def restartable(folder: Path, *flags: str) -> AsyncIterator[tuple[ServerProcess, Client]]:
    """The same in a process of its own, which takes flags, and can be killed and started again."""
    async with serving(folder, *SCRIPTED, *flags) as server, Client(server.address) as client:
        yield server, client


def new_token(folder: Path, role: str) -> str:
    """Creates a token for the server in a folder."""
    return editing.add(folder / "access.toml", role, tenant=DEFAULT_TENANT, role=Role(role))


@asynccontextmanager
async def guarded(folder: Path) -> AsyncIterator[tuple[LocalServer, str, str]]:
    """Starts a server with an access file; yields it, a token that may run, one that may read."""
    runs, reads = new_token(folder, "run"), new_token(folder, "read")
    config = Config(drain_timeout=0.0, access=str(folder / "access.toml"))
    async with LocalServer("scripted", config=config) as server:
        yield server, runs, reads


def script(*steps: Mapping[str, object]) -> str:
    """Returns the prompt for a script of these steps."""
    return json.dumps(steps)


def gated(gate: str, before: str = "begun ", after: str = "ended") -> str:
    """Returns a prompt that prints a text, waits for a gate, and prints another text."""
    return script({"text": before}, {"wait": gate}, {"text": after})


async def open_gate(client: Client, gate: str) -> None:
    """Opens a gate for all runs that wait for it now or later."""
    await say(client, script({"open": gate}), session="gates")


async def say(client: Client, prompt: str = "hello", *, session: str = "by-hand") -> str:
    """Executes a run to its end; returns its id."""
    handle = await client.run_accepted(session, prompt, allow_missing=True)
    await handle.completed(SECONDS)
    return handle.run_id


async def pass_marks(address: str, run_id: str, count: int = 4) -> None:
    """Waits until every stream of an idle run has sent marks: counts those of a new stream."""
    async with grpc.aio.insecure_channel(address) as channel, asyncio.timeout(SECONDS):
        runs = run_service_pb2_grpc.RunServiceStub(channel)
        request = run_service_pb2.SubscribeRunRequest(run_id=run_id)
        async for message in runs.SubscribeRun(request):
            count -= message.HasField("progress")
            if count == 0:
                return


async def runs_of(client: Client, session: str) -> dict[str, RunState]:
    """Returns the states of the runs of a session, in accept order."""
    runs = [run async for run in client.list_runs(session)]
    return {run.run_id: run.state for run in reversed(runs)}


async def becomes(what: Callable[[], Awaitable[bool]], seconds: float = SECONDS) -> None:
    """Polls for a condition that cannot be awaited, such as the content of a file."""
    async with asyncio.timeout(seconds):
        while not await what():
            await asyncio.sleep(0.02)


async def becomes_state(client: Client, run_id: str, state: RunState) -> None:
    """Waits until a run is in a state."""

    async def is_there() -> bool:
        return (await client.get_run(run_id)).state is state

    await becomes(is_there)


async def becomes_compacted(client: Client, cursor: str) -> None:
    """Waits until the events after a cursor are compacted."""

    async def is_refused() -> bool:
        try:
            async with client.subscribe_run_complete(cursor=cursor):
                return False
        except CursorCompacted:
            return True

    await becomes(is_refused)


async def kept(client: Client, last: str) -> list[str]:
    """Returns the ids of all retained completions, up to this one."""
    found: list[str] = []
    async for complete in client.subscribe_run_complete(from_beginning=True, max_silence=SECONDS):
        found.append(complete.run_id)
        if complete.run_id == last:
            break
    return found
