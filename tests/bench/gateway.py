"""The cost of the HTTP door: CPU per event of a followed run, against gRPC without a gateway."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from functools import partial

import httpx2

from bench.bench import Bench
from bench.process import Server, cores
from bench.rates import MICROSECONDS, ratios
from bench.result import Budget, Figure, Row
from runlane import Client
from support.processes import cpu_seconds

BUDGET = Budget(3, 2, at_most=True)

TALKERS, WORDS = 32, 1_000
TALKATIVE = ("--agent", "echo:delay=5ms")

TOKEN = "token-of-the-benchmark"  # noqa: S105 - of a gateway on loopback, for seconds

Follow = Callable[[str], Awaitable[int]]
"""Follows the run with an id to its end, and returns the number of its events."""


async def gateway(bench: Bench) -> list[Row]:
    """Followed runs through the gateway, against the same without it."""
    ours, peer = await bench.in_turn(partial(_over_http, bench), partial(_over_grpc, bench))
    title = "CPU of server and gateway for an event by SSE, to that of the server by gRPC"
    return [Row("gateway", title, "µs", ratios(ours, peer), ours, peer, BUDGET)]


async def _over_grpc(bench: Bench) -> Figure:
    async with bench.runlane(*TALKATIVE) as server, Client(server.address) as client:

        async def follow(run_id: str) -> int:
            return len([event async for event in client.subscribe_run(run_id)])

        return await _cost(bench, client, follow, server.pid)


async def _over_http(bench: Bench) -> Figure:
    with bench.folder() as folder:
        async with bench.runlane(*TALKATIVE) as server, Client(server.address) as client:
            command = [
                *(sys.executable, "-m", "runlane_web", "-S", server.address),
                *("--listen", "127.0.0.1:0", "--own-token"),
            ]
            env = {"RUNLANE_WEB_TOKEN": TOKEN}
            async with (
                Server(command, folder, cores()[0], env) as door,
                httpx2.AsyncClient(
                    base_url=door.address,
                    headers={"Authorization": f"Bearer {TOKEN}"},
                    timeout=60.0,
                    limits=httpx2.Limits(max_connections=TALKERS),
                ) as http,
            ):
                return await _cost(bench, client, partial(_read, http), server.pid, door.pid)


async def _read(http: httpx2.AsyncClient, run_id: str) -> int:
    async with http.stream("GET", f"/v1/runs/{run_id}/events") as response:
        assert response.status_code == 200, response.status_code
        return len([line async for line in response.aiter_lines() if line.startswith("id:")])


async def _cost(bench: Bench, client: Client, follow: Follow, *pids: int) -> Figure:
    prompt = "word " * bench.size(WORDS, 50)
    before = sum(cpu_seconds(pid) for pid in pids)
    runs = [
        await client.run_accepted(f"s{n}", prompt, allow_missing=True)
        for n in range(bench.size(TALKERS, 4))
    ]
    events = sum(await asyncio.gather(*(follow(run.run_id) for run in runs)))
    used = sum(cpu_seconds(pid) for pid in pids) - before
    return Figure(used / events * MICROSECONDS)
