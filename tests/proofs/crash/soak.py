"""Opens and cancels thousands of streams and runs, and measures what the server retains:
`python -m proofs.crash.soak --blocks 10 --warm-up 9`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from proofs.crash.listeners import connected
from runlane import Client
from runlane.v1 import run_service_pb2 as pb
from support.processes import open_descriptors, resident_bytes
from support.server import serving
from support.staging import SECONDS

BLOCK = 1000
"""The number of streams, and of runs, in one block."""

AT_ONCE = 20
SESSIONS = 50

BOUND_KIB = 256
"""KiB by which a warm server may grow per block. Measured: 162 KiB over ten blocks, of which gRPC
keeps about 34 KiB per thousand streams that are cancelled properly (grpc#43360). One leaked task
per stream would be 10,000 KiB, one leaked table entry of 100 bytes 200 KiB."""

AGENT = """
import asyncio

from runlane_server.core.model import TextDelta


class Probe:
    async def start(self):
        pass

    async def run(self, turn):
        if turn.prompt.text == "how many tasks?":
            yield TextDelta(str(len(asyncio.all_tasks())))
            return
        yield TextDelta(turn.prompt.text)
        await asyncio.Event().wait()

    async def close(self):
        pass


agent = Probe()
"""
"""An agent that works until it is cancelled, and reports the number of tasks on request."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """The resources of an idle server."""

    rss_kib: int
    descriptors: int
    tasks: int


@dataclass(slots=True)
class Soak:
    """A server under the same load, block after block."""

    client: Client
    address: str
    pid: int
    block: int = BLOCK
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    async def load(self) -> None:
        """Runs one block: runs that are cancelled while they are followed, and idle streams."""
        await self._at_once(self._run)
        await self._at_once(self._stream)

    async def idle(self) -> Footprint:
        """The footprint once it is stable."""
        kept = await self._measure()
        async with asyncio.timeout(SECONDS):
            while True:
                again = await self._measure()
                if (again.descriptors, again.tasks) == (kept.descriptors, kept.tasks):
                    return again
                kept = again

    async def returned_to(self, base: Footprint) -> Footprint:
        """The footprint once it is down to `base`, or after a third of the timeout."""
        kept = await self._measure()
        deadline = time.monotonic() + SECONDS / 3
        while (kept.descriptors, kept.tasks) > (base.descriptors, base.tasks):
            if time.monotonic() > deadline:
                break
            kept = await self._measure()
        return kept

    async def _measure(self) -> Footprint:
        asked = await self.client.run_accepted("probe", "how many tasks?", allow_missing=True)
        tasks = (await asked.completed(SECONDS)).text
        return Footprint(resident_bytes(self.pid) >> 10, open_descriptors(self.pid), int(tasks))

    async def _at_once(self, work: Callable[[int], Awaitable[None]]) -> None:
        left = iter(range(self.block))

        async def some() -> None:
            for _ in left:
                await work(next(self.numbers))

        await asyncio.gather(*(some() for _ in range(AT_ONCE)))

    async def _run(self, n: int) -> None:
        """Follows a run and cancels it meanwhile."""
        handle = await self.client.run_accepted(f"s{n % SESSIONS}", "hello", allow_missing=True)
        if n % 2:
            async with handle.events() as events:
                await anext(events)
        await handle.cancel()
        await handle.completed(SECONDS)

    async def _stream(self, n: int) -> None:
        """Opens a stream that is cancelled, or whose client disconnects."""
        if n % 10 == 0:
            async with connected(self.address) as stub:
                await stub.SubscribeRunComplete(pb.SubscribeRunCompleteRequest()).read()
            return
        call = self.client._wire.runs.SubscribeRunComplete(
            pb.SubscribeRunCompleteRequest(session_ids=[f"s{n % SESSIONS}"] if n % 3 else [])
        )
        await call.read()
        call.cancel()
        assert await call.code() is grpc.StatusCode.CANCELLED


@dataclass(frozen=True, slots=True)
class Result:
    """The footprints: before the load, after each block, and at the end."""

    base: Footprint
    blocks: Sequence[Footprint]
    last: Footprint

    @property
    def growth_kib(self) -> float:
        """The growth per block in KiB, fitted over all blocks."""
        rss = [self.base.rss_kib, *(kept.rss_kib for kept in self.blocks)]
        return statistics.linear_regression(range(len(rss)), rss).slope


async def soak(folder: Path, *, warm_up: int, blocks: int, block: int = BLOCK) -> Result:
    """Runs a soak against a server in an empty folder."""
    (folder / "probe.py").write_text(AGENT)
    flags = ("--agent", "probe:agent", "--log-level", "warning", "--cancel-grace", "5s")
    async with serving(folder, *flags) as server, Client(server.address) as client:
        load = Soak(client, server.address, server.pid, block)
        for _ in range(warm_up):
            await load.load()
        base = await load.idle()
        measured = []
        for _ in range(blocks):
            await load.load()
            measured.append(await load._measure())
        return Result(base, measured, await load.returned_to(base))


def main() -> int:
    """Runs the soak and prints the result; returns 1 if the server grew."""
    parser = argparse.ArgumentParser(prog="python -m proofs.crash.soak", description=__doc__)
    parser.add_argument("--blocks", type=int, default=10, help="of 1,000 streams and 1,000 runs")
    parser.add_argument("--warm-up", type=int, default=9, help="blocks that do not count")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="runlane-soak-") as folder:
        begun = time.monotonic()
        # The in-memory tail of the event log grows until it has 8,192 runs.
        result = asyncio.run(soak(Path(folder), warm_up=options.warm_up, blocks=options.blocks))
    for n, kept in enumerate((result.base, *result.blocks, result.last)):
        print(f"{n:3}  {kept.rss_kib:>9,} KiB  {kept.descriptors:>4} files  {kept.tasks:>4} tasks")
    print(f"GROWTH {result.growth_kib:.0f} KiB a block, bound {BOUND_KIB} KiB")
    print(f"{time.monotonic() - begun:.0f} s")
    base, last = result.base, result.last
    leaked = last.descriptors > base.descriptors or last.tasks > base.tasks
    return 1 if leaked or result.growth_kib > BOUND_KIB else 0


if __name__ == "__main__":
    sys.exit(main())
