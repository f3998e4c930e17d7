"""Restarts servers one after another while workers execute runs, and checks that none notices:
`python -m proofs.crash.rolling --store postgresql --runs 300 --rounds 3`.

Over PostgreSQL there are three nodes, and a round restarts each; over SQLite there is one. Every
second stop is a kill.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from runlane import Client, RunEvent, RunHandle
from support.postgres import fresh_database, own_postgres
from support.server import ServerProcess, clean_environment
from support.workers import Counter, accept, check_whole, working

WORDS_PER_SECOND = 2.0
"""Of each run: hundreds of them leave time for the servers on two cores."""

PATIENCE = 120.0
"""Seconds within which every run must go on after a restart. A lease of a worker is shorter, so a
run that does not go on would end."""

NODES = {"postgresql": 3, "sqlite": 1}

SIGNALS = (signal.SIGTERM, signal.SIGKILL)


class Followed:
    """A run and its events, as a subscriber sees them across lost connections."""

    def __init__(self, handle: RunHandle, progress: asyncio.Event) -> None:
        self.run_id = handle.run_id
        self.events: list[RunEvent] = []
        self.task = asyncio.create_task(self._follow(handle))
        self._progress = progress

    async def _follow(self, handle: RunHandle) -> None:
        async for event in handle.events():
            self.events.append(event)
            self._progress.set()

    def has_news(self, since: datetime) -> bool:
        """Whether something was stored after a time."""
        if self.task.done():
            raise AssertionError(f"{self.run_id} has ended: {self.events[-1].body}")
        return bool(self.events) and self.events[-1].time > since

    @property
    def longest_silence(self) -> float:
        """Seconds between two events."""
        times = [event.time for event in self.events]
        return max((b - a).total_seconds() for a, b in pairwise(times))


async def until_all_go_on(followed: Sequence[Followed], progress: asyncio.Event) -> float:
    """Waits until every run has stored something new; returns the seconds."""
    since, began = datetime.now(UTC), time.monotonic()
    async with asyncio.timeout(PATIENCE):
        while not all(each.has_news(since) for each in followed):
            progress.clear()
            await progress.wait()
    return time.monotonic() - began


@asynccontextmanager
async def servers(store: str, folder: Path) -> AsyncIterator[list[ServerProcess]]:
    """The servers over one store; they are killed at the end."""
    async with AsyncExitStack() as closing:
        url = f"sqlite:///{folder}/runlane.db"
        if store == "postgresql":
            base = closing.enter_context(own_postgres()).url
            url = await closing.enter_async_context(fresh_database(base))
        nodes: list[ServerProcess] = []
        for number in range(NODES[store]):
            (folder / str(number)).mkdir()
            env = {**clean_environment(), "RUNLANE_STORE": url}
            flags = ("--agent", "worker", "--log-format", "json", "--max-active-runs", "10000")
            node = ServerProcess(folder / str(number), *flags, base=env)
            closing.push_async_callback(node.kill)
            await node.start()
            nodes.append(node)
        yield nodes


def restarts(nodes: Sequence[ServerProcess], rounds: int) -> Iterator[tuple[int, signal.Signals]]:
    """The node of each restart, and how it is stopped."""
    for number in range(rounds * len(nodes)):
        yield number % len(nodes), SIGNALS[number % 2]


async def roll(store: str, runs: int, rounds: int, folder: Path) -> None:
    """Restarts servers under runs of workers; raises AssertionError if a run notices."""
    counter, progress = Counter(WORDS_PER_SECOND), asyncio.Event()
    async with servers(store, folder) as nodes, AsyncExitStack() as closing:
        targets = [node.address for node in nodes]
        agents = {"default": counter.run}
        await closing.enter_async_context(working(targets, agents, slots=runs))
        clients = [
            await closing.enter_async_context(Client(target, timeout=60)) for target in targets
        ]
        handles = [await accept(clients[n % len(nodes)], f"s{n}", "count") for n in range(runs)]
        followed = [Followed(handle, progress) for handle in handles]
        print(f"{runs} runs stream after {await until_all_go_on(followed, progress):.1f} s")
        for number, how in restarts(nodes, rounds):
            await nodes[number].stop(how)
            await nodes[number].start()
            seconds = await until_all_go_on(followed, progress)
            print(f"server {number}: {how.name}, all runs go on {seconds:.1f} s later", flush=True)
        counter.may_end.set()
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(each.task for each in followed))
    for each in followed:
        check_whole(each.events, counter.said[each.run_id])
    events = sum(len(each.events) for each in followed)
    silence = max(each.longest_silence for each in followed)
    print(
        f"{store}: {len(nodes) * rounds} restarts, {runs} runs, 0 interrupted; {events:,} events,"
        f" each once and in order; longest silence of a run {silence:.1f} s"
    )


def main() -> None:
    """Rolls; the exit code is 1 if a run was interrupted."""
    parser = argparse.ArgumentParser(prog="proofs.crash.rolling", description=__doc__)
    parser.add_argument("--store", choices=tuple(NODES), default="sqlite")
    parser.add_argument("--runs", type=int, default=300, help="number of streaming runs")
    parser.add_argument("--rounds", type=int, default=3, help="restarts of each server")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="runlane-rolling-") as folder:
        asyncio.run(roll(options.store, options.runs, options.rounds, Path(folder)))


if __name__ == "__main__":
    main()
