"""Rates: operations per second of the server on its core, against gRPC alone on that core."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from bench import wire
from bench.bench import ACCEPT, ECHOED, SUBSCRIBE, Bench, figure
from bench.load import CALL, call
from bench.process import cores
from bench.result import Budget, Figure, Row
from runlane.v1.run_service_pb2 import SubscribeRunRequest

HOLDS = ("--max-active-runs", "0", "--max-waiting-total", "100000000")
"""Flags of a node that accepts every run and executes none."""

KEPT = ("--event-retention", "0")
"""Flags that keep retention from removing old data of prepared stores."""

SUBSCRIBERS = 100

MICROSECONDS = 1e6

WORDS = 2_000
TALKERS = 128
TALKATIVE = ("--agent", "echo:delay=5ms")
"""More runs than one core can serve, at one word per run every 5 ms."""


def ratios(ours: list[Figure], peer: list[Figure]) -> list[float]:
    """Our value relative to the peer's, per round."""
    return [a.value / b.value for a, b in zip(ours, peer, strict=True)]


async def echo(bench: Bench) -> Figure:
    """The upper bound of all calls."""
    async with bench.bare() as server:
        return figure(await bench.run(server, kind="unary", call=ECHOED))


async def bare_stream(bench: Bench, streams: int, message: bytes) -> Figure:
    """The upper bound of all streams."""
    watch = call(wire.BARE + "Stream", message)
    async with bench.bare() as server:
        return figure(await bench.run(server, kind="streams", watch=watch, streams=streams))


async def accepts(bench: Bench, store: Path | None = None) -> Figure:
    """Durable accepts, each in its own session."""
    async with bench.runlane(*HOLDS, *KEPT, store=store) as server:
        return figure(await bench.run(server, kind="unary", call=ACCEPT))


async def completes(bench: Bench, store: Path | None = None, streams: int = 1) -> Figure:
    """Terminal events of runs, each in its own session, accepted as fast as they end."""
    async with bench.runlane(*KEPT, store=store) as server:
        measured = await bench.run(
            server, kind="runs", call=ACCEPT, watch=SUBSCRIBE, streams=streams
        )
        return figure(measured)


async def accept(bench: Bench) -> list[Row]:
    """Accepts against echoes."""
    ours, peer = await bench.in_turn(partial(accepts, bench), partial(echo, bench))
    title = "durable RunAccepted, a session each, to bare unary echo"
    return [Row("accept", title, "/s", ratios(ours, peer), ours, peer, Budget(0.6, 0.8))]


async def metrics(bench: Bench) -> list[Row]:
    """The cost of metrics: CPU time of an accept with and without them."""
    title = "CPU of the server for a durable RunAccepted with metrics, to that without"
    return [await _cost_of(bench, "metrics", title, "--metrics-listen", "0")]


async def sight(bench: Bench) -> list[Row]:
    """The cost of telemetry: metrics, and one exported trace per run."""
    title = "CPU of the server for a durable RunAccepted with metrics and traces, to that without"
    async with bench.bare(cores()[1]) as collector:
        flags = ("--metrics-listen", "0", "--otlp-endpoint", f"http://{collector.address}")
        return [await _cost_of(bench, "sight", title, *flags)]


async def _cost_of(bench: Bench, name: str, title: str, *flags: str) -> Row:
    """Measures each side twice per round, the second time in reverse order, so that drift
    affects both."""
    seeing, blind = partial(_cost, bench, *flags), partial(_cost, bench)
    on, off, off_again, on_again = await bench.in_turn(seeing, blind, blind, seeing)
    ours, peer = _mean(on, on_again), _mean(off, off_again)
    return Row(name, title, "µs", ratios(ours, peer), ours, peer, Budget(1.05, at_most=True))


def _mean(once: list[Figure], again: list[Figure]) -> list[Figure]:
    return [
        Figure(
            (a.value + b.value) / 2,
            (a.server_cpu + b.server_cpu) / 2,
            (a.load_cpu + b.load_cpu) / 2,
        )
        for a, b in zip(once, again, strict=True)
    ]


async def _cost(bench: Bench, *flags: str) -> Figure:
    async with bench.runlane(*HOLDS, *KEPT, *flags) as server:
        measured = await bench.run(server, kind="unary", call=ACCEPT)
    return Figure(measured.cost * MICROSECONDS, measured.server_cpu, measured.load_cpu)


async def complete(bench: Bench) -> list[Row]:
    """Whole runs against echoes."""
    ours, peer = await bench.in_turn(partial(completes, bench), partial(echo, bench))
    title = "accept to terminal event, one subscription, to bare unary echo"
    return [Row("complete", title, "/s", ratios(ours, peer), ours, peer, Budget(0.35, 0.5))]


async def fanout(bench: Bench) -> list[Row]:
    """Terminal events to many subscribers, with the execution of the runs and without."""
    streams = bench.size(SUBSCRIBERS, 10)
    live, burst, peer = await bench.in_turn(
        partial(completes, bench, None, streams),
        partial(_burst, bench, streams),
        partial(bare_stream, bench, streams, b"terminal"),
    )
    budget = Budget(0.7, 0.9)
    title = f"terminal events to {streams} subscribers, to bare server stream"
    return [
        Row("fanout", f"{title} (runs included)", "/s", ratios(live, peer), live, peer, budget),
        Row("fanout-only", f"{title} (delivery alone)", "/s", ratios(burst, peer), burst, peer),
    ]


async def _burst(bench: Bench, streams: int) -> Figure:
    """Delivery alone: all waiting runs of a node are cancelled at once."""
    count = bench.size(3_000, 50)
    async with bench.runlane(*HOLDS) as server:
        measured = await bench.run(
            server,
            kind="burst",
            call=ACCEPT,
            watch=SUBSCRIBE,
            cancel=call(wire.SERVICE + "CancelAll", b""),
            streams=streams,
            count=count,
        )
        return figure(measured)


async def deltas(bench: Bench) -> list[Row]:
    """Text deltas of streaming agents, against bare messages of the same size."""
    talkers = bench.size(TALKERS, 4)
    ours, peer = await bench.in_turn(
        partial(_talking, bench, talkers), partial(bare_stream, bench, talkers, b"delta")
    )
    title = f"text deltas of {talkers} runs by SubscribeRun, to bare server stream"
    return [Row("deltas", title, "words/s", ratios(ours, peer), ours, peer)]


async def _talking(bench: Bench, talkers: int) -> Figure:
    async with bench.runlane(*TALKATIVE) as server:
        measured = await bench.run(
            server,
            kind="streams",
            call=call(CALL, wire.accept("word " * bench.size(WORDS, 50), named=True)),
            watch=call(wire.SERVICE + "SubscribeRun", SubscribeRunRequest(run_id=wire.name(0))),
            streams=talkers,
            word="word ",
        )
        return figure(measured)
