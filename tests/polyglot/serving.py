"""The servers of these tests, with the scripted agent, and the test's own client of them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from polyglot.program import SECONDS
from runlane import Client, CursorCompacted, RunState
from support.server import ServerProcess, serving

SCRIPTED = ("--store", "sqlite:///runlane.db", "--agent", "scripted")

RUN_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
"""A UUIDv7 (RFC 9562, section 5.7)."""


@asynccontextmanager
async def scripted(folder: Path, *flags: str) -> AsyncIterator[tuple[ServerProcess, Client]]:
    """A server whose agent does what its prompt says, and a client with a connection of its own."""
    async with serving(folder, *SCRIPTED, *flags) as server, Client(server.address) as client:
        yield server, client


def script(*steps: Mapping[str, object]) -> str:
    """The prompt that has the agent take these steps."""
    return json.dumps(steps)


def gated(gate: str, before: str = "begun ", after: str = "ended") -> str:
    """A prompt: says something, waits for a gate, and says something."""
    return script({"text": before}, {"wait": gate}, {"text": after})


async def open_gate(client: Client, gate: str) -> None:
    """Lets the runs go on that wait for it, or come to it later."""
    await say(client, script({"open": gate}), session="gates")


async def say(client: Client, prompt: str = "hello", *, session: str = "by-hand") -> str:
    """Has a run done; returns its id once it has ended."""
    handle = await client.run_accepted(session, prompt, allow_missing=True)
    await handle.completed(SECONDS)
    return handle.run_id


async def runs_of(client: Client, session: str) -> dict[str, RunState]:
    """The states of the runs of a session, in the order in which they were accepted."""
    runs = [run async for run in client.list_runs(session)]
    return {run.run_id: run.state for run in reversed(runs)}


async def becomes(what: Callable[[], Awaitable[bool]], seconds: float = SECONDS) -> None:
    """Waits for a state that nobody announces: something in a file, or of another process."""
    async with asyncio.timeout(seconds):
        while not await what():
            await asyncio.sleep(0.02)


async def becomes_state(client: Client, run_id: str, state: RunState) -> None:
    """Waits until a run is in a state."""

    async def is_there() -> bool:
        return (await client.get_run(run_id)).state is state

    await becomes(is_there)


async def becomes_compacted(client: Client, cursor: str) -> None:
    """Waits until events behind a cursor are gone."""

    async def is_refused() -> bool:
        try:
            async with client.subscribe_run_complete(cursor=cursor):
                return False
        except CursorCompacted:
            return True

    await becomes(is_refused)


async def kept(client: Client, last: str) -> list[str]:
    """The ids of all runs whose ends are kept, up to this one."""
    found: list[str] = []
    async for complete in client.subscribe_run_complete(from_beginning=True, max_silence=SECONDS):
        found.append(complete.run_id)
        if complete.run_id == last:
            break
    return found
