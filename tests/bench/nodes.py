"""Several nodes over one PostgreSQL. Nodes, database and load share all cores."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench import wire
from bench.bench import ACCEPT, SUBSCRIBE, Bench, figure
from bench.load import Measured, call
from bench.process import Server
from bench.rates import HOLDS, KEPT, ratios
from bench.result import Budget, Figure, Row
from bench.waits import CANCELS, PAUSE, SLOW, quantile, round_trip
from runlane.v1.run_service_pb2 import CancelRequest

if TYPE_CHECKING:
    from support.postgres import OwnPostgres

PROCESSES = (1, 2, 4)

CONNECTIONS = 64
"""The kernel assigns connections to processes at random; this many are spread about evenly."""

WINDOW = 1_024

MICROSECONDS = 1e6

LOST = 2_000


@asynccontextmanager
async def database() -> AsyncIterator[OwnPostgres]:
    """A PostgreSQL for one measurement, with the default durability."""
    from support.postgres import own_postgres  # noqa: PLC0415 - an extra

    with own_postgres() as server:
        server.settings |= {"shared_buffers": "256MB"}
        await server.restart()
        yield server


@asynccontextmanager
async def node(
    bench: Bench, store: str, *flags: str, python: Path | None = None
) -> AsyncIterator[Server]:
    """A server over a store, on any core. `python` is that of another checkout."""
    with bench.folder() as folder:
        argv = [
            *(str(python or sys.executable), "-m", "runlane_server"),
            *("--listen", "127.0.0.1:0", "--store", store),
            *("--event-loop", bench.event_loop, *KEPT, *flags),
        ]
        async with Server(argv, folder, None) as server:
            yield server


async def processes(bench: Bench) -> list[Row]:
    """Whole runs of one or more processes over PostgreSQL, against one over SQLite."""
    measured: dict[int, list[Measured]] = {count: [] for count in (0, *PROCESSES)}

    async def embedded() -> Figure:
        with bench.folder() as folder:
            async with node(bench, f"sqlite:///{folder / 'runlane.db'}") as server:
                measured[0].append(await _runs(bench, server))
        return figure(measured[0][-1])

    async def together(count: int) -> Figure:
        flags = ("--processes", str(count)) if count > 1 else ()
        async with database() as store, node(bench, store.url, *flags) as server:
            measured[count].append(await _runs(bench, server, store.pid))
        return figure(measured[count][-1])

    peer, *ours = await bench.in_turn(embedded, *(partial(together, n) for n in PROCESSES))
    title = "accept to terminal event, one process over SQLite, on all cores"
    rows = [Row("sqlite-1", title, "/s", [], peer, notes=_costs(measured[0]))]
    for count, found in zip(PROCESSES, ours, strict=True):
        title = f"the same by {count} over PostgreSQL, to one over SQLite"
        notes = _costs(measured[count])
        rows.append(
            Row(f"processes-{count}", title, "/s", ratios(found, peer), found, peer, notes=notes)
        )
    return rows


async def _runs(bench: Bench, server: Server, store: int | None = None) -> Measured:
    return await bench.run(
        server,
        beside=store,
        kind="runs",
        call=ACCEPT,
        watch=SUBSCRIBE,
        connections=bench.size(CONNECTIONS, 8),
        window=WINDOW,
        concurrency=2 * bench.concurrency,
    )


def _costs(measured: list[Measured]) -> dict[str, float]:
    """The median CPU time of a run."""
    costs = {"µs a run of the nodes": median(one.cost * MICROSECONDS for one in measured)}
    if measured[0].beside_cpu:
        costs["and of the database"] = median(
            one.beside_cpu / one.rate * MICROSECONDS for one in measured
        )
    return costs


async def failover(bench: Bench) -> list[Row]:
    """The active runs of a node that is gone, recovered by two others."""
    from proofs.nodes.failover import measure  # noqa: PLC0415 - an extra

    async def recovered() -> Figure:
        async with database() as store:
            found = await measure(store, runs, lambda url: node(bench, url, "--node-lease", "2s"))
            return Figure(found)

    runs = bench.size(LOST, 20)
    (found,) = await bench.in_turn(recovered)
    title = f"{runs:,} active runs of a lost node, from the first recovered to the last"
    judged = [it.value for it in found]
    budget = Budget(5, 2, at_most=True)
    return [Row("nodes-failover", title, "s", judged, found, budget=budget, judged_unit="s")]


async def flush(bench: Bench) -> list[Row]:
    """Accepts at eight nodes over a database with a slow flush."""
    from proofs.nodes.flushes import FLUSH, measure  # noqa: PLC0415 - an extra

    ends: list[float] = []

    async def accepted() -> Figure:
        async with database() as store:
            store.flush_in(FLUSH)
            await store.restart()
            waits = await measure(store, nodes=8, seconds=bench.size(8, 1))
        ends.append(median(waits.ends) * 1000)
        return Figure(median(waits.accepts) * 1000)

    (found,) = await bench.in_turn(accepted)
    title = f"an accept at one of 8 nodes that end runs, p50, a flush takes {FLUSH * 1000:g} ms"
    flushes = [it.value / FLUSH / 1000 for it in found]
    budget = Budget(3, 2, at_most=True)
    notes = {"p50 of an end, ms": median(ends)}
    return [Row("nodes-flush", title, "ms", flushes, found, [], budget, "flushes", notes=notes)]


async def cancel(bench: Bench) -> list[Row]:
    """Cancels at a node that executes nothing, of runs that another node executes."""
    medians: list[float] = []

    async def cancelled() -> Figure:
        async with (
            database() as store,
            node(bench, store.url, *SLOW),
            node(bench, store.url, *HOLDS) as front,
        ):
            measured = await bench.run(
                front,
                kind="cancel",
                call=ACCEPT,
                watch=SUBSCRIBE,
                cancel=call(wire.SERVICE + "Cancel", CancelRequest(session_id=wire.name(0))),
                count=bench.size(CANCELS, 20),
                # The other node claims waiting runs gradually.
                pause=2 * PAUSE,
            )
        medians.append(measured.latency["p50"] * 1000)
        return quantile(measured, "p99")

    ours, peer = await bench.in_turn(cancelled, partial(round_trip, bench))
    title = "Cancel at one node sent to CANCELLED seen there, executed by another, p99"
    return [Row("nodes-cancel", title, "ms", [], ours, peer, notes={"p50, ms": median(medians)})]
