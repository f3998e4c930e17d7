"""Agents that stream: how many at a time, the CPU of a token, and short runs of a chat agent."""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median

from bench import wire
from bench.bench import ACCEPT, SUBSCRIBE, Bench
from bench.load import CALL, Load, Measured, call
from bench.process import Server, cores
from bench.rates import MICROSECONDS, ratios
from bench.result import Budget, Figure, Row
from runlane.v1.run_service_pb2 import SubscribeRunRequest

WORDS = 200
PAUSE = 0.020
"""Seconds between two words: 50 words per second, for 4 s."""

MAX_GAP = 0.150
"""The longest p99 of the seconds between two messages of a run."""

MAX_FIRST = 0.500
"""The longest p99 of the seconds from the accept being sent to the first word."""

GROWTH = 1.5
PRECISION = 1.1
"""The search ends when the fewest streams that are too many are at most this multiple of the most
that are not."""

MAX_STREAMS = 2_000
MAX_TRIES = 12

CONCURRENCY = 32
"""Concurrent runs, and concurrent requests of the peer, in the row `chat`."""

ROOM = ("--max-active-runs", str(MAX_STREAMS))

Serve = Callable[[], AbstractAsyncContextManager["Side"]]


@dataclass(frozen=True, slots=True)
class Side:
    """A server whose agent streams, and the process of its model, if it has one."""

    server: Server
    model: Server | None = None

    async def run(self, bench: Bench, **job: object) -> Measured:
        """Runs a job. The model counts as a part of the load, whose core it shares."""
        beside = None if self.model is None else self.model.pid
        return await bench.run(self.server, beside=beside, **job)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of agent. `guess` is where the search for the most streams starts; `cheap` is the
    number of streams, far from the most, at which the CPU of a word is measured."""

    name: str
    title: str
    serve: Serve
    guess: int
    cheap: int
    most: Budget
    cost: Budget


@dataclass(slots=True)
class Found:
    """Other findings of the rounds; the next one starts with `guess` streams."""

    guess: int
    costs: list[Figure] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)


async def streams(bench: Bench) -> list[Row]:
    """Runs of an agent that only yields."""

    @asynccontextmanager
    async def serve() -> AsyncIterator[Side]:
        agent = f"echo:delay={PAUSE * 1000:.0f}ms"
        async with bench.runlane("--agent", agent, *ROOM) as server:
            yield Side(server)

    kind = Kind(
        "streams",
        "concurrent runs of an agent that yields 50 words/s",
        serve,
        guess=bench.size(200, 4),
        cheap=bench.size(100, 4),
        most=Budget(400, 600),
        cost=Budget(45, 30, at_most=True),
    )
    return await _rows(bench, kind)


async def chat_streams(bench: Bench) -> list[Row]:
    """Runs of a chat agent, whose model is the endpoint."""
    kind = Kind(
        "chat-streams",
        "concurrent runs of a chat agent whose model sends 50 words/s",
        partial(_chatting, bench, _words(bench), PAUSE),
        guess=bench.size(50, 4),
        cheap=bench.size(20, 4),
        most=Budget(150, 250),
        cost=Budget(150, 80, at_most=True),
    )
    return await _rows(bench, kind)


async def chat(bench: Bench) -> list[Row]:
    """Short runs of a chat agent, against requests to the same endpoint with bare httpx."""
    ours, peer = await bench.in_turn(partial(_chats, bench), partial(_requests, bench))
    title = "chat runs of three words, accept to terminal event, to bare httpx"
    return [Row("chat", title, "/s", ratios(ours, peer), ours, peer, Budget(0.3, 0.5))]


def _words(bench: Bench) -> int:
    return bench.size(WORDS, 20)


def model_name(words: int, pause: float) -> str:
    """The name of a model that sends so many words, with a pause after each."""
    return f"word-{words}-{pause * 1000:.0f}ms"


@asynccontextmanager
async def _chatting(bench: Bench, words: int, pause: float) -> AsyncIterator[Side]:
    async with bench.endpoint() as model:
        env = {"OPENAI_BASE_URL": f"http://{model.address}/v1", "OPENAI_API_KEY": "none"}
        agent = f"chat:openai:{model_name(words, pause)}"
        async with bench.runlane("--agent", agent, *ROOM, env=env) as server:
            yield Side(server, model)


async def _rows(bench: Bench, kind: Kind) -> list[Row]:
    found = Found(kind.guess)
    (held,) = await bench.in_turn(partial(_most, bench, kind, found))
    notes = {"gap p99, ms": median(found.gaps), "first word p99, ms": median(found.firsts)}
    of_word = f"CPU of the server per word, {kind.cheap} {kind.title}"
    costs = found.costs
    return [
        Row(kind.name, kind.title, "runs", _values(held), held, budget=kind.most, notes=notes),
        Row(f"{kind.name}-cpu", of_word, "µs", _values(costs), costs, budget=kind.cost),
    ]


def _values(figures: list[Figure]) -> list[float]:
    return [figure.value for figure in figures]


async def _most(bench: Bench, kind: Kind, found: Found) -> Figure:
    """The most streams within both limits, on one server; first the CPU of a word."""
    async with kind.serve() as side:
        cheap = await _talk(bench, side, kind.cheap)
        found.costs.append(Figure(cheap.cost * MICROSECONDS, cheap.server_cpu, _load(cheap)))
        tried = {0: cheap}

        async def holds(count: int) -> bool:
            tried[count] = await _talk(bench, side, count)
            return _is_even(tried[count])

        held = await search(found.guess, holds, tries=1 if bench.quick else MAX_TRIES)
    at_most = tried[held]
    found.guess = held or found.guess
    found.gaps.append(_p99(at_most.latency) * 1000)
    found.firsts.append(_p99(at_most.first) * 1000)
    return Figure(held, at_most.server_cpu, _load(at_most))


async def search(
    guess: int, holds: Callable[[int], Awaitable[bool]], *, tries: int = MAX_TRIES
) -> int:
    """The most streams that hold, within `PRECISION`; 0 if none do. It goes up or down from the
    guess until the limit is between two counts, and then halves the distance."""
    most, too_many, count = 0, MAX_STREAMS + 1, guess
    for _ in range(tries):
        if await holds(count):
            most = count
        else:
            too_many = count
        if too_many > MAX_STREAMS:
            count = min(MAX_STREAMS, round(most * GROWTH))
        elif most == 0:
            count = int(too_many / GROWTH)
        else:
            count = round((most + too_many) / 2)
        if too_many <= most * PRECISION or count in {0, most, too_many}:
            break
    return most


def _is_even(measured: Measured) -> bool:
    return _p99(measured.latency) <= MAX_GAP and _p99(measured.first) <= MAX_FIRST


def _p99(seconds: Mapping[str, float]) -> float:
    """Infinite if no word came at all."""
    return seconds.get("p99", math.inf)


async def _talk(bench: Bench, side: Side, count: int) -> Measured:
    words = _words(bench)
    length = words * PAUSE
    return await side.run(
        bench,
        kind="tokens",
        call=call(CALL, wire.accept("word " * words, named=True)),
        watch=call(wire.SERVICE + "SubscribeRun", SubscribeRunRequest(run_id=wire.name(0))),
        streams=count,
        word="word ",
        # Every run begins, and ends, within each of them.
        warmup=length + bench.warmup,
        seconds=length + bench.seconds,
    )


def _load(measured: Measured) -> float:
    return measured.load_cpu + measured.beside_cpu


async def _chats(bench: Bench) -> Figure:
    async with _chatting(bench, 3, 0.0) as side:
        measured = await side.run(
            bench,
            kind="runs",
            call=ACCEPT,
            watch=SUBSCRIBE,
            concurrency=CONCURRENCY,
            window=CONCURRENCY,
        )
    return Figure(measured.rate, measured.server_cpu, _load(measured))


async def _requests(bench: Bench) -> Figure:
    """The peer has the core of the servers, and is itself what is measured."""
    job = {
        "model": model_name(3, 0.0),
        "concurrency": CONCURRENCY,
        "warmup": bench.warmup,
        "seconds": bench.seconds,
    }
    command = [sys.executable, "-m", "bench.chat_peer"]
    async with bench.endpoint() as model:
        with bench.folder() as folder:
            async with Load(command, cores()[0], folder) as peer:
                measured = await peer.run(model, job)
    return Figure(measured.rate, measured.load_cpu, measured.server_cpu)
