"""Curves: the cost per item by the number of items."""

from __future__ import annotations

from bench import seed
from bench.bench import ACCEPT, CACHE, SUBSCRIBE, Bench
from bench.past import store_with
from bench.rates import KEPT
from bench.result import Curve

MICROSECONDS = 1e6


async def by_sessions(bench: Bench) -> list[Curve]:
    """Runs in existing sessions, by their number."""
    points: list[tuple[int, float, float]] = []
    for sessions in [10, 100, 1_000, 10_000, 100_000][: bench.size(5, 2)]:
        store = await seed.store_of(CACHE, seed.completed, sessions, 1)
        async with bench.runlane(*KEPT, store=store) as server:
            measured = await bench.run(
                server,
                kind="runs",
                call=ACCEPT,
                watch=SUBSCRIBE,
                sessions=sessions,
                first=0,
                window=min(bench.window, 8 * sessions),
            )
        points.append((sessions, measured.cost * MICROSECONDS, measured.rate))
    title = "cost of a run as sessions grow"
    return [Curve("by-sessions", title, "sessions", "CPU of the server, µs a run", points)]


async def by_past(bench: Bench) -> list[Curve]:
    """Runs in new sessions, by the number of earlier runs."""
    points: list[tuple[int, float, float]] = []
    for runs in [10, 1_000, 10_000, 100_000, 1_000_000][: bench.size(5, 2)]:
        store = await store_with(runs)
        async with bench.runlane(*KEPT, store=store) as server:
            measured = await bench.run(server, kind="runs", call=ACCEPT, watch=SUBSCRIBE)
        points.append((runs, measured.cost * MICROSECONDS, measured.rate))
    title = "cost of a run as past runs grow"
    return [Curve("by-past", title, "past runs", "CPU of the server, µs a run", points)]


async def by_subscribers(bench: Bench) -> list[Curve]:
    """Terminal events, by the number of subscribers."""
    points: list[tuple[int, float, float]] = []
    for streams in [1, 10, 100, 1_000][: bench.size(4, 2)]:
        async with bench.runlane() as server:
            measured = await bench.run(
                server, kind="runs", call=ACCEPT, watch=SUBSCRIBE, streams=streams
            )
        points.append((streams, measured.cost * MICROSECONDS, measured.rate))
    title = "cost of delivering an event as subscribers grow"
    cost = "CPU of the server, µs an event and subscriber"
    return [Curve("by-subscribers", title, "subscribers", cost, points)]
