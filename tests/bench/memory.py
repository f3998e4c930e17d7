"""Memory per item: the growth of a server between few items and many."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from bench import wire
from bench.bench import ACCEPT, SUBSCRIBE, Bench
from bench.load import call
from bench.process import Server
from bench.rates import HOLDS, KEPT, ratios
from bench.result import Budget, Figure, Row
from bench.waits import SLOW
from support.processes import resident_bytes

SETTLE = 1.5
"""Seconds for a server to settle before its memory is measured."""

NOTHING = 20.0
"""Bytes per item, at 100,000 items, below the resolution of the resident memory."""

Grow = Callable[[int], Awaitable[Any]]


async def growth(bench: Bench, server: Server, grow: Grow, few: int, many: int) -> Figure:
    """Bytes per item between few and many. `grow(n)` brings the number of items to n."""
    resident: list[int] = []
    for count in (few, many):
        await grow(count)
        await asyncio.sleep(0.2 if bench.quick else SETTLE)
        resident.append(resident_bytes(server.pid))
    return Figure((resident[1] - resident[0]) / (many - few))


async def subscriptions(bench: Bench) -> list[Row]:
    """Idle subscriptions against idle bare streams."""
    few, many = bench.size(1_000, 50), bench.size(5_000, 250)

    async def held(server: Server, watch: dict[str, str]) -> Figure:
        async with bench.load() as load:
            steps = {"kind": "idle", "watch": watch, "steps": [few, many], "prefix": wire.PREFIX}
            await load.send(steps | {"address": server.address, "connections": bench.connections})

            async def open_more(count: int) -> None:
                if count == many:
                    await load.send()
                await load.read()

            return await growth(bench, server, open_more, few, many)

    async def ours() -> Figure:
        async with bench.runlane() as server:
            return await held(server, SUBSCRIBE)

    async def bare() -> Figure:
        async with bench.bare() as server:
            return await held(server, call(wire.BARE + "Idle", b"delta"))

    found, peer = await bench.in_turn(ours, bare)
    title = f"memory of an idle subscription, {few:,} to {many:,}, to an idle bare stream"
    budget = Budget(1.5, 1.2, at_most=True)
    return [Row("subscriptions", title, "bytes", ratios(found, peer), found, peer, budget)]


async def sessions(bench: Bench) -> list[Row]:
    """Idle sessions that were used before."""
    few, many = bench.size(30_000, 200), bench.size(130_000, 600)
    used = 0

    async def measured() -> Figure:
        nonlocal used
        used = 0
        async with bench.runlane(*KEPT) as server:

            async def use(count: int) -> None:
                nonlocal used
                await bench.run(
                    server, kind="runs", call=ACCEPT, watch=SUBSCRIBE, count=count - used
                )
                used = count

            return await growth(bench, server, use, few, many)

    (ours,) = await bench.in_turn(measured)
    title = f"memory of an idle session, {many - few:,} of them used"
    found = [figure.value for figure in ours]
    budget = Budget(NOTHING, at_most=True)
    return [Row("sessions", title, "bytes", found, ours, budget=budget, judged_unit="bytes")]


async def runs(bench: Bench) -> list[Row]:
    """Active runs and waiting runs, each in its own session."""
    sides = {
        "active": (SLOW, bench.size(500, 20), bench.size(4_500, 120)),
        "waiting": (HOLDS, bench.size(5_000, 100), bench.size(45_000, 600)),
    }
    return [
        await _runs(bench, what, flags, few, many) for what, (flags, few, many) in sides.items()
    ]


async def _runs(bench: Bench, what: str, flags: tuple[str, ...], few: int, many: int) -> Row:
    async def measured() -> Figure:
        async with bench.runlane(*flags) as server:

            async def accept(count: int) -> None:
                more = count if count == few else many - few
                await bench.run(server, kind="unary", call=ACCEPT, count=more)

            return await growth(bench, server, accept, few, many)

    (ours,) = await bench.in_turn(measured)
    return Row(f"{what}-runs", f"memory of a run that is {what}", "bytes", [], ours)
