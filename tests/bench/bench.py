"""The means of a measurement: servers on one core, load on the other, rounds in turn."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import wire
from bench.load import CALL, ECHO, Load, Measured, call
from bench.process import Server, cores
from bench.result import Figure
from runlane.v1.run_service_pb2 import SubscribeRunCompleteRequest

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "bench"

SUBSCRIBE = call(wire.SERVICE + "SubscribeRunComplete", SubscribeRunCompleteRequest())
ACCEPT = call(CALL, wire.accept())
ECHOED = call(ECHO, wire.accept())

NEW = 10_000_000_000
"""Numbers from here on are of sessions that no store has that was made beforehand."""

Measure = Callable[[], Awaitable[Figure]]


@dataclass(slots=True)
class Bench:
    """How to measure, and where. Times are in seconds."""

    scratch: Path
    generator: list[str]
    rounds: int = 5
    seconds: float = 5.0
    warmup: float = 2.0
    quick: bool = False
    workers: int = 64
    connections: int = 8
    window: int = 512
    event_loop: str = "auto"
    used: int = NEW

    def size(self, full: int, quick: int) -> int:
        """How many of something, in earnest or to see whether it works at all."""
        return quick if self.quick else full

    def fresh(self, count: int) -> int:
        """The first of so many numbers that were never used before."""
        self.used += count
        return self.used - count

    @asynccontextmanager
    async def bare(self, core: int | None = None) -> AsyncIterator[Server]:
        """The limit; on the core of the servers, if no other one is named."""
        core = cores()[0] if core is None else core
        with self.folder() as folder:
            async with Server([sys.executable, "-m", "bench.bare"], folder, core) as server:
                yield server

    @asynccontextmanager
    async def runlane(self, *flags: str, store: Path | None = None) -> AsyncIterator[Server]:
        """Runlane with an empty store, or with a copy of that one."""
        with self.folder() as folder:
            if store:
                _copy(store, folder / "runlane.db")
            argv = [
                *(sys.executable, "-m", "runlane_server", "--listen", "127.0.0.1:0"),
                *("--store", f"sqlite:///{folder / 'runlane.db'}"),
                *("--event-loop", self.event_loop, *flags),
            ]
            async with Server(argv, folder, cores()[0]) as server:
                yield server

    @asynccontextmanager
    async def load(self) -> AsyncIterator[Load]:
        """A load generator."""
        with self.folder() as folder:
            async with Load(self.generator, cores()[1], folder) as load:
                yield load

    async def run(self, server: Server, *, store: int | None = None, **job: Any) -> Measured:
        """Runs a job, set as usual where it says nothing else. `store` is the process id of a
        database, to be watched too."""
        usual = {
            "connections": self.connections,
            "workers": self.workers,
            "streams": 1,
            "window": self.window,
            "seconds": self.seconds,
            "warmup": self.warmup,
            "first": self.fresh(10_000_000),
        }
        async with self.load() as load:
            return await load.run(server, {**usual, **job}, store=store)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder on the disk that stores are on, gone when it is left."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            yield Path(folder)

    async def in_turn(self, *sides: Measure) -> list[list[Figure]]:
        """Measures all sides in each round, one after another."""
        found: list[list[Figure]] = [[] for _ in sides]
        for _ in range(self.rounds):
            for figures, side in zip(found, sides, strict=True):
                figures.append(await side())
        return found


def figure(measured: Measured) -> Figure:
    """The rate, and who was busy with it."""
    return Figure(measured.rate, measured.server_cpu, measured.load_cpu)


def _copy(store: Path, target: Path) -> None:
    shutil.copyfile(store, target)
    # What is written later is not to wait for this.
    with target.open("rb+") as copied:
        os.fsync(copied.fileno())
