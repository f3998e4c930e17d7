"""Runs that wait for people: the memory of each, and the start of a server with many."""

from __future__ import annotations

import asyncio
import time

from bench.bench import Bench
from bench.memory import growth
from bench.process import Server
from bench.rates import KEPT
from bench.result import Budget, Figure, Row
from runlane import Client, InputState
from support.staging import script

SCRIPTED = ("--agent", "scripted", *KEPT)

PATIENCE = 300.0
"""Seconds for all runs to ask."""

CONCURRENCY = 32


async def asking(bench: Bench) -> list[Row]:
    """Runs whose agent has left until the answer, and runs whose agent waits for it."""
    return [row for leaves in (True, False) for row in await _asking(bench, leaves=leaves)]


async def _asking(bench: Bench, *, leaves: bool) -> list[Row]:
    few, many = bench.size(1_000, 20), bench.size(11_000, 70)
    starts: list[Figure] = []

    async def measured() -> Figure:
        async with bench.runlane(*SCRIPTED) as server:
            async with Client(server.address, timeout=PATIENCE) as client:
                runs = _Runs(client, leaves=leaves)
                grown = await growth(bench, server, runs.grow, few, many)
            starts.append(await _restart(server))
            async with Client(server.address, timeout=PATIENCE) as client:
                await _until_open(client, many)
            return grown

    (ours,) = await bench.in_turn(measured)
    how = "has left" if leaves else "waits"
    name = "left" if leaves else "held"
    memory = f"memory of a run that waits for input and whose agent {how}, {many - few:,} of them"
    start = f"start with {many:,} such runs, to the first answer"
    seconds = [figure.value for figure in starts]
    budget = Budget(2.0, 0.5, at_most=True)
    return [
        Row(f"asking-{name}", memory, "bytes", [], ours),
        Row(f"start-asking-{name}", start, "s", seconds, starts, [], budget, "s"),
    ]


class _Runs:
    """Runs that ask, each in its own session."""

    def __init__(self, client: Client, *, leaves: bool) -> None:
        self._client = client
        self._prompt = script({"ask": {"text": "well?"}, "leave": leaves})
        self._count = 0

    async def grow(self, count: int) -> None:
        """Brings the number of open questions to `count`."""
        numbers = iter(range(self._count, count))

        async def accept() -> None:
            for number in numbers:
                # An agent that waits loses its attempt with its server, and asks again.
                await self._client.run_accepted(
                    f"s{number}", self._prompt, max_attempts=10, allow_missing=True
                )

        await asyncio.gather(*(accept() for _ in range(CONCURRENCY)))
        self._count = count
        await _until_open(self._client, count)


async def _until_open(client: Client, count: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            listed = client.list_input_requests(states=[InputState.OPEN], page_size=1000)
            if len([None async for _ in listed]) == count:
                return
            await asyncio.sleep(0.2)


async def _restart(server: Server) -> Figure:
    """Seconds from the start of the process to its first answer."""
    await server.restart()
    async with Client(server.address, timeout=60) as client:
        await anext(aiter(client.list_sessions(page_size=1)))
    return Figure(time.perf_counter() - server.begun)
