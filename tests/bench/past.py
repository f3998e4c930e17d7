"""The cost of a long history: the same measurements with it and without."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from bench import seed
from bench.bench import CACHE, Bench
from bench.rates import SUBSCRIBERS, accepts, completes, ratios
from bench.result import Budget, Figure, Row
from bench.waits import cancels

RUNS = 1_000_000
PER_SESSION = 10


async def store_with(runs: int) -> Path:
    """A store with `count` past runs."""
    return await seed.store_of(CACHE, seed.completed, max(runs // PER_SESSION, 1), PER_SESSION)


async def past(bench: Bench) -> list[Row]:
    """Rates with a million past runs relative to those with none; for a cancel, relative speed."""
    runs = bench.size(RUNS, 2_000)
    store = await store_with(runs)
    streams = bench.size(SUBSCRIBERS, 10)
    rows: list[Row] = []
    for name, measure in {
        "accept": partial(accepts, bench),
        "complete": partial(completes, bench),
        "fanout": partial(completes, bench, streams=streams),
        "cancel": partial(_cancels_each_second, bench),
    }.items():
        ours, peer = await bench.in_turn(partial(measure, store=store), measure)
        title = f"{name} with {runs:,} past runs, to an empty store"
        rows.append(
            Row(f"past-{name}", title, "/s", ratios(ours, peer), ours, peer, Budget(0.9, 0.95))
        )
    return rows


async def _cancels_each_second(bench: Bench, store: Path | None = None) -> Figure:
    """The rate of sequential calls: the inverse of their latency."""
    measured = await cancels(bench, store)
    return Figure(measured.rate, measured.server_cpu, measured.load_cpu)
