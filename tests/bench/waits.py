"""Latencies: an accept, a cancel until it is seen, a start, a page of a transcript."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from statistics import median

import grpc

from bench import seed, wire
from bench.bench import ACCEPT, CACHE, ECHOED, SUBSCRIBE, Bench
from bench.load import Measured, call
from bench.process import Server
from bench.rates import HOLDS, KEPT, ratios
from bench.result import Budget, Figure, Row
from runlane.v1 import (
    run_service_pb2,
    session_service_pb2,
    session_service_pb2_grpc,
)
from support.processes import cpu_seconds

SLOW = ("--agent", "echo:delay=3600s", "--max-active-runs", "5000")
"""Flags for an agent that emits a word and stays active until it is cancelled."""

CANCELS = 500
PAUSE = 2.0
"""Seconds for accepted runs to become active."""

PAGE = 1_000


def quantile(measured: Measured, name: str) -> Figure:
    """A latency, in milliseconds."""
    return Figure(measured.latency[name] * 1000, measured.server_cpu, measured.load_cpu)


async def latency(bench: Bench) -> list[Row]:
    """The latency of an accept at half of the maximum rate, against an echo at half of its own."""
    peaks: dict[str, float] = {}
    medians: dict[str, list[float]] = {"ours": [], "peer": []}

    async def at_half(who: str) -> Figure:
        server = bench.runlane(*HOLDS) if who == "ours" else bench.bare()
        request = ACCEPT if who == "ours" else ECHOED
        async with server as running:
            if who not in peaks:
                peaks[who] = (await bench.run(running, kind="unary", call=request)).rate
            half = peaks[who] / 2
            measured = await bench.run(running, kind="unary", call=request, rate=half)
        medians[who].append(measured.latency["p50"] * 1000)
        return quantile(measured, "p99")

    ours, peer = await bench.in_turn(partial(at_half, "ours"), partial(at_half, "peer"))
    notes = {f"p50 {who}, ms": median(found) for who, found in medians.items()}
    notes |= {f"offered {who}, /s": peak / 2 for who, peak in peaks.items()}
    title = "RunAccepted at half load, p99, to bare unary echo at half load"
    return [Row("accept-latency", title, "ms", ratios(ours, peer), ours, peer, notes=notes)]


async def cancels(bench: Bench, store: Path | None = None) -> Measured:
    """Cancels active runs one after another, each until a subscriber has its end."""
    request = run_service_pb2.CancelRequest(session_id=wire.name(0))
    async with bench.runlane(*SLOW, *KEPT, store=store) as server:
        return await bench.run(
            server,
            kind="cancel",
            call=ACCEPT,
            watch=SUBSCRIBE,
            cancel=call(wire.SERVICE + "Cancel", request),
            count=bench.size(CANCELS, 20),
            pause=0.5 if bench.quick else PAUSE,
        )


async def round_trip(bench: Bench) -> Figure:
    """The median round trip of an echo on an idle bare server, in milliseconds."""
    async with bench.bare() as server:
        return quantile(await bench.run(server, kind="unary", call=ECHOED, concurrency=1), "p50")


async def cancel(bench: Bench) -> list[Row]:
    """The p99 of cancels, in round trips of an echo on an idle server."""
    medians: list[float] = []

    async def cancelled() -> Figure:
        measured = await cancels(bench)
        medians.append(measured.latency["p50"] * 1000)
        return quantile(measured, "p99")

    ours, peer = await bench.in_turn(cancelled, partial(round_trip, bench))
    trips = ratios(ours, peer)
    title = "Cancel sent to CANCELLED seen, p99, in round trips (p50) of the bare echo"
    budget = Budget(8, 4, at_most=True)
    half = median(medians) / median(figure.value for figure in peer)
    notes = {"p50, ms": median(medians), "p50, round trips": half}
    return [Row("cancel", title, "ms", trips, ours, peer, budget, "round trips", notes)]


async def start(bench: Bench) -> list[Row]:
    """Seconds from process start to the first answer, with many waiting runs and with none."""
    waiting = bench.size(100_000, 500)
    stored = await seed.store_of(CACHE, seed.accepted, waiting, 1)

    async def answered(store: Path | None) -> Figure:
        async with bench.runlane(store=store) as server:
            announced.append(time.perf_counter() - server.begun)
            _ask(server)
            return Figure(time.perf_counter() - server.begun)

    announced: list[float] = []
    ours, peer = await bench.in_turn(partial(answered, stored), partial(answered, None))
    title = f"start with {waiting:,} waiting runs, to the first answer"
    budget = Budget(2.0, 0.5, at_most=True)
    notes = {
        "listening, s": median(announced[::2]),
        "with an empty store, s": median(figure.value for figure in peer),
    }
    seconds = [figure.value for figure in ours]
    return [Row("start", title, "s", seconds, ours, peer, budget, "s", notes)]


def _ask(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        sessions = session_service_pb2_grpc.SessionServiceStub(channel)
        sessions.ListSessions(session_service_pb2.ListSessionsRequest(page_size=1), timeout=60)


async def messages(bench: Bench) -> list[Row]:
    """A long transcript, read page by page."""
    runs = bench.size(10_000, 100)
    stored = await seed.store_of(CACHE, seed.completed, 1, runs)
    notes: dict[str, float] = {}

    async def read() -> Figure:
        async with bench.runlane(*KEPT, store=stored) as server:
            before, begun = cpu_seconds(server.pid), time.perf_counter()
            pages, count = _read_all(server)
            elapsed = time.perf_counter() - begun
            used = cpu_seconds(server.pid) - before
        notes["first page, ms"] = pages[0] * 1000
        notes["last full page, ms"] = pages[-2 if len(pages) > 1 else -1] * 1000
        return Figure(count / elapsed, used / elapsed)

    (ours,) = await bench.in_turn(read)
    title = f"ListMessages over a transcript of {2 * runs:,} messages, {PAGE:,} a page"
    return [Row("messages", title, "messages/s", [], ours, notes=notes)]


def _read_all(server: Server) -> tuple[list[float], int]:
    """The seconds of each page, and the number of messages."""
    took: list[float] = []
    count, token = 0, ""
    with grpc.insecure_channel(server.address) as channel:
        sessions = session_service_pb2_grpc.SessionServiceStub(channel)
        while token or not took:
            request = session_service_pb2.ListMessagesRequest(
                session_id=wire.name(0), page_size=PAGE, page_token=token
            )
            begun = time.perf_counter()
            page = sessions.ListMessages(request, timeout=60)
            took.append(time.perf_counter() - begun)
            count, token = count + len(page.messages), page.next_page_token
    return took, count
