"""Agents in a process of their own, against the same agents in the server's process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from bench import wire
from bench.bench import SUBSCRIBE, Bench
from bench.load import CALL, call
from bench.process import Server
from bench.rates import ratios
from bench.result import Figure, Row
from bench.streams import CONCURRENCY, WORDS, model_name

Measured = Callable[[Bench, str], Awaitable[Figure]]


async def agent_processes(bench: Bench) -> list[Row]:
    """Words per second over both cores, which the server shares with the load."""
    return [
        await _row(bench, "agent-processes", "an agent that yields as fast as it can", _yielding),
        await _row(
            bench, "chat-agent-processes", "a chat agent whose model does not pause", _chatting
        ),
    ]


async def _row(bench: Bench, name: str, agent: str, measure: Measured) -> Row:
    ours, peer = await bench.in_turn(partial(measure, bench, "1"), partial(measure, bench, "0"))
    title = f"words of {agent}, --agent-processes 1 to 0"
    return Row(name, title, "/s", ratios(ours, peer), ours, peer)


async def _yielding(bench: Bench, processes: str) -> Figure:
    flags = ("--agent", "bench.yielding:answer", "--agent-processes", processes)
    async with bench.runlane(*flags, anywhere=True) as server:
        return await _words(bench, server)


async def _chatting(bench: Bench, processes: str) -> Figure:
    async with bench.endpoint() as endpoint:
        env = {"OPENAI_BASE_URL": f"http://{endpoint.address}/v1", "OPENAI_API_KEY": "none"}
        agent = f"chat:openai:{model_name(WORDS, 0.0)}"
        flags = ("--agent", agent, "--agent-processes", processes)
        async with bench.runlane(*flags, anywhere=True, env=env) as server:
            return await _words(bench, server)


async def _words(bench: Bench, server: Server) -> Figure:
    measured = await bench.run(
        server,
        kind="runs",
        call=call(CALL, wire.accept("word " * WORDS)),
        watch=SUBSCRIBE,
        concurrency=CONCURRENCY,
        window=CONCURRENCY,
    )
    return Figure(measured.rate * WORDS, measured.server_cpu, measured.load_cpu)
