"""CPU time of this checkout relative to that of another one, such as the commit before a change."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from bench import nodes, wire
from bench.bench import ACCEPT, SUBSCRIBE, Bench
from bench.load import Measured, call
from bench.process import Server
from bench.rates import HOLDS, KEPT, MICROSECONDS, ratios
from bench.result import Budget, Figure, Row

BUDGET = Budget(1.05, 1.0, at_most=True)

Job = Callable[[Bench, Server, int | None], Awaitable[Measured]]


async def before(bench: Bench) -> list[Row]:
    """Accepts, whole runs, and cancels of waiting runs, over both databases."""
    if bench.before is None:
        raise RuntimeError("--before is missing; pass the Python of the other checkout")
    rows = []
    for store in ("sqlite", "postgres"):
        rows.append(await _row(bench, store, "accept", _accepts, HOLDS))
        rows.append(await _row(bench, store, "complete", _completes))
        rows.append(await _row(bench, store, "cancel", _cancels, HOLDS))
    return rows


async def _row(bench: Bench, store: str, name: str, job: Job, flags: Sequence[str] = ()) -> Row:
    """Measures each side twice per round, the second time in reverse order, so that drift
    affects both."""
    ours = partial(_cost, bench, store, job, flags, None)
    theirs = partial(_cost, bench, store, job, flags, bench.before)
    one, two, three, four = await bench.in_turn(ours, theirs, theirs, ours)
    here, there = [*one, *four], [*two, *three]
    title = f"CPU of server and database, {name} over {store}, to that of the other checkout"
    return Row(f"before-{store}-{name}", title, "µs", ratios(here, there), here, there, BUDGET)


async def _cost(
    bench: Bench, store: str, job: Job, flags: Sequence[str], python: Path | None
) -> Figure:
    async with _served(bench, store, flags, python) as (server, database):
        measured = await job(bench, server, database)
    cost = measured.cost + measured.beside_cpu / measured.rate
    return Figure(cost * MICROSECONDS, measured.server_cpu, measured.load_cpu)


@asynccontextmanager
async def _served(
    bench: Bench, store: str, flags: Sequence[str], python: Path | None
) -> AsyncIterator[tuple[Server, int | None]]:
    """A server of a checkout, and the id of its database."""
    if store == "sqlite":
        async with bench.runlane(*KEPT, *flags, python=python) as server:
            yield server, None
        return
    async with (
        nodes.database() as database,
        nodes.node(bench, database.url, *flags, python=python) as server,
    ):
        yield server, database.pid


async def _accepts(bench: Bench, server: Server, database: int | None) -> Measured:
    return await bench.run(server, beside=database, kind="unary", call=ACCEPT)


async def _completes(bench: Bench, server: Server, database: int | None) -> Measured:
    return await bench.run(server, beside=database, kind="runs", call=ACCEPT, watch=SUBSCRIBE)


async def _cancels(bench: Bench, server: Server, database: int | None) -> Measured:
    """All waiting runs are cancelled at once, and one subscriber has their ends."""
    return await bench.run(
        server,
        beside=database,
        kind="burst",
        call=ACCEPT,
        watch=SUBSCRIBE,
        cancel=call(wire.SERVICE + "CancelAll", b""),
        count=bench.size(3_000, 50),
    )
