"""Measures the cost of Runlane relative to that of gRPC alone.

cd tests && python -m bench.run --quick
cd tests && python -m bench.run --only accept --only cancel --rounds 5 --seconds 5
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

import grpc
import structlog

from bench import (
    agent_processes,
    asking,
    before,
    curves,
    gateway,
    memory,
    nodes,
    past,
    peers,
    plot,
    rates,
    report,
    streams,
    waits,
)
from bench.bench import CACHE, Bench
from bench.load import generator
from bench.process import cores
from bench.result import Curve, Results, Row
from runlane_server.config.settings import EVENT_LOOPS

Measurement = Callable[[Bench], Awaitable[Sequence[Row | Curve]]]

MEASUREMENTS: Mapping[str, Measurement] = {
    "accept": rates.accept,
    "metrics": rates.metrics,
    "sight": rates.sight,
    "complete": rates.complete,
    "fanout": rates.fanout,
    "cancel": waits.cancel,
    "subscriptions": memory.subscriptions,
    "sessions": memory.sessions,
    "past": past.past,
    "start": waits.start,
    "latency": waits.latency,
    "deltas": rates.deltas,
    "gateway": gateway.gateway,
    "streams": streams.streams,
    "chat-streams": streams.chat_streams,
    "chat": streams.chat,
    "agent-processes": agent_processes.agent_processes,
    "messages": waits.messages,
    "runs": memory.runs,
    "asking": asking.asking,
    "processes": nodes.processes,
    "nodes-cancel": nodes.cancel,
    "nodes-failover": nodes.failover,
    "nodes-flush": nodes.flush,
    "by-sessions": curves.by_sessions,
    "by-past": curves.by_past,
    "by-subscribers": curves.by_subscribers,
    "a2a": peers.a2a,
    "dbos": peers.dbos,
    "restate": peers.restate,
    "before": before.before,
}

ASKED_FOR = {"a2a", "dbos", "restate", "before"}
"""Measurements that run only by name: they need more than this checkout."""

QUICK = {"rounds": 1, "seconds": 0.5, "warmup": 0.2}


async def measure(bench: Bench, names: Sequence[str], results: Results) -> None:
    """Runs the measurements one after another, and prints each result at once.

    A failed measurement is reported, and the others still run.
    """
    for name in names:
        try:
            found = await MEASUREMENTS[name](bench)
        except (AssertionError, RuntimeError, TimeoutError, OSError, grpc.RpcError) as error:
            results.failed[name] = f"{type(error).__name__}: {error}"
            sys.stdout.write(f"{name:16} FAILED {results.failed[name]}\n")
            continue
        results.add(found)
        for one in found:
            sys.stdout.write(report.line(one) + "\n")
            sys.stdout.flush()


def about(load: str, bench: Bench) -> dict[str, object]:
    """The machine and the settings of a benchmark."""
    server, client = cores()
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": load,
        "rounds": bench.rounds,
        "seconds": bench.seconds,
        "concurrency": bench.concurrency,
        "connections": bench.connections,
        "event loop": bench.event_loop,
        "cores": f"{server} (server), {client} (load)",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "synced write": f"{synced_write(bench.scratch) * 1000:.2f} ms",
        "python": platform.python_version(),
        "grpcio": version("grpcio"),
    }


def synced_write(folder: Path, count: int = 50) -> float:
    """The median seconds of a synced write: every durable operation waits for one."""
    taken: list[float] = []
    with tempfile.NamedTemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(count):
            file.write(bytes(4096))
            begun = time.perf_counter()
            os.fdatasync(file.fileno())
            taken.append(time.perf_counter() - begun)
    return median(taken)


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.run", description=__doc__)
    parser.add_argument("--only", action="append", choices=MEASUREMENTS, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per measurement")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds per side and round")
    parser.add_argument("--warmup", type=float, default=2.0, help="seconds of warm-up before each")
    parser.add_argument("--concurrency", type=int, default=64, help="concurrent calls")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="check only that the benchmark works")
    parser.add_argument("--load", choices=["go", "python"], default="", help="load generator")
    parser.add_argument(
        "--event-loop",
        choices=EVENT_LOOPS,
        default="auto",
        help="event loop of Runlane, not of the peer",
    )
    parser.add_argument(
        "--before", type=Path, help="Python of another checkout, for the measurement `before`"
    )
    parser.add_argument("--out", type=Path, default=CACHE / "results", help="folder of the results")
    parser.epilog = "NAME is one of " + ", ".join(MEASUREMENTS)
    return parser


def main(argv: Sequence[str] | None = None) -> Results:
    """Runs the chosen measurements; prints them, and writes them as JSON and as a picture."""
    chosen = options().parse_args(argv)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    load, command = generator(CACHE, chosen.load)
    CACHE.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="scratch-") as scratch:
        settings = {
            "rounds": chosen.rounds,
            "seconds": chosen.seconds,
            "warmup": chosen.warmup,
        }
        bench = Bench(
            Path(scratch),
            command,
            quick=chosen.quick,
            concurrency=chosen.concurrency,
            connections=chosen.connections,
            event_loop=chosen.event_loop,
            before=chosen.before,
            **(QUICK if chosen.quick else settings),
        )
        results = Results(about(load, bench))
        sys.stdout.write(report.heading(results) + "\n")
        try:
            usual = [name for name in MEASUREMENTS if name not in ASKED_FOR]
            asyncio.run(measure(bench, chosen.only or usual, results))
        finally:
            stem = chosen.out / f"bench-{datetime.now(UTC):%Y%m%d-%H%M%S}"
            results.write(stem.with_suffix(".json"))
    sys.stdout.write(f"\n{report.table(results)}\n\n")
    picture = plot.draw(results, stem.with_suffix(".png"))
    elapsed = time.perf_counter() - begun
    sys.stdout.write(f"{stem.with_suffix('.json')}\n{picture}\n{elapsed:.0f} s\n")
    return results


if __name__ == "__main__":
    sys.exit(1 if main().failed else 0)
