"""Runs measurements: servers on one core, load on the other, both sides in alternating rounds."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
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

NO_ENV: Mapping[str, str] = MappingProxyType({})

NEW = 10_000_000_000
"""The first session number that no prepared store uses."""

Measure = Callable[[], Awaitable[Figure]]


@dataclass(slots=True)
class Bench:
    """The settings of a measurement. Times are in seconds."""

    scratch: Path
    generator: list[str]
    rounds: int = 5
    seconds: float = 5.0
    warmup: float = 2.0
    quick: bool = False
    concurrency: int = 64
    connections: int = 8
    window: int = 512
    event_loop: str = "auto"
    before: Path | None = None
    used: int = NEW

    def size(self, full: int, quick: int) -> int:
        """The full size, or with `quick` the small one."""
        return quick if self.quick else full

    def fresh(self, count: int) -> int:
        """Reserves `count` unused numbers, and returns the first."""
        self.used += count
        return self.used - count

    @asynccontextmanager
    async def bare(self, core: int | None = None) -> AsyncIterator[Server]:
        """The bare server, by default on the core of the servers."""
        core = cores()[0] if core is None else core
        with self.folder() as folder:
            async with Server([sys.executable, "-m", "bench.bare"], folder, core) as server:
                yield server

    @asynccontextmanager
    async def runlane(
        self,
        *flags: str,
        store: Path | None = None,
        env: Mapping[str, str] = NO_ENV,
        anywhere: bool = False,
        python: Path | None = None,
    ) -> AsyncIterator[Server]:
        """Runlane with an empty store, or with a copy of `store`. `env` adds variables. With
        `anywhere` it is not pinned to the core of the servers. `python` is that of another
        checkout."""
        with self.folder() as folder:
            if store:
                _copy(store, folder / "runlane.db")
            argv = [
                *(str(python or sys.executable), "-m", "runlane_server"),
                *("--listen", "127.0.0.1:0"),
                *("--store", f"sqlite:///{folder / 'runlane.db'}"),
                *("--event-loop", self.event_loop, *flags),
            ]
            core = None if anywhere else cores()[0]
            async with Server(argv, folder, core, env) as server:
                yield server

    @asynccontextmanager
    async def endpoint(self) -> AsyncIterator[Server]:
        """A language model with the API of OpenAI, on the core of the load. Raises RuntimeError
        without the generator in Go, which contains it."""
        if len(self.generator) > 1:
            raise RuntimeError("the endpoint is a part of the load generator in Go; install Go")
        with self.folder() as folder:
            async with Server([*self.generator, "endpoint"], folder, cores()[1]) as server:
                yield server

    @asynccontextmanager
    async def load(self) -> AsyncIterator[Load]:
        """A load generator."""
        with self.folder() as folder:
            async with Load(self.generator, cores()[1], folder) as load:
                yield load

    async def run(self, server: Server, *, beside: int | None = None, **job: Any) -> Measured:
        """Runs a job with default settings, which `job` overrides. `beside` is the id of a process
        to be measured too, such as a database."""
        usual = {
            "connections": self.connections,
            "concurrency": self.concurrency,
            "streams": 1,
            "window": self.window,
            "seconds": self.seconds,
            "warmup": self.warmup,
            "first": self.fresh(10_000_000),
        }
        async with self.load() as load:
            return await load.run(server, {**usual, **job}, beside=beside)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A temporary folder on the disk of the stores."""
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
    """The rate, and the CPU shares of both sides."""
    return Figure(measured.rate, measured.server_cpu, measured.load_cpu)


def _copy(store: Path, target: Path) -> None:
    shutil.copyfile(store, target)
    # Later writes must not wait for this one.
    with target.open("rb+") as copied:
        os.fsync(copied.fileno())
