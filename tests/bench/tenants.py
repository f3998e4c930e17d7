"""The latency of a quiet tenant's runs beside a noisy tenant.

    cd tests && PYTHONPATH=../server:../client python -m bench.tenants --waiting 10000

It runs in one process, over SQLite. The quiet tenant accepts one run at a time and waits for its
end; first alone, then beside a noisy tenant with many waiting lanes, each with a run of 0.2 s. With
a quota for active runs, the noisy tenant leaves slots free. Without one it has all slots, and the
quiet tenant waits for the next free one.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from runlane_server.access.quotas import NO_LIMIT, Quota, QuotaBook, Quotas
from runlane_server.agents.echo import EchoAgent
from runlane_server.core.limits import Limits
from runlane_server.core.model import Prompt, RunRequest
from runlane_server.engine.coordinator import Coordinator
from runlane_server.feed.feed import Feed
from runlane_server.store.sqlite.store import SqliteStore

SLOTS = 16
AT_ONCE = 500

RUN_SECONDS = 0.2
"""Seconds between the two words of a noisy run: its duration."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds from accept to the terminal event."""

    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """The latencies of some runs."""
        ordered = sorted(seconds)
        p50, p99 = (ordered[int(len(ordered) * part)] * 1000 for part in (0.5, 0.99))
        return cls(p50, p99)

    def against(self, other: Latency) -> str:
        """The latencies as text, with their ratio to a reference."""
        return (
            f"p50 {self.p50:6.2f} ms ({self.p50 / other.p50:5.2f})   "
            f"p99 {self.p99:6.2f} ms ({self.p99 / other.p99:5.2f})"
        )


async def measure(waiting: int, runs: int, quota: Quota) -> Latency:
    """The latency of `runs` runs of the quiet tenant, beside `waiting` lanes of the noisy one."""
    async with AsyncExitStack() as closing:
        folder = closing.enter_context(tempfile.TemporaryDirectory())
        store = await closing.enter_async_context(SqliteStore(Path(folder) / "runlane.db"))
        feed = Feed(store)
        coordinator = Coordinator(
            store,
            EchoAgent(delay=RUN_SECONDS),
            feed,
            Limits(max_active_runs=SLOTS),
            quotas=QuotaBook(Quotas({"noisy": quota})),
        )
        await coordinator.start()
        for first in range(0, waiting, AT_ONCE):
            numbers = range(first, min(first + AT_ONCE, waiting))
            await asyncio.gather(*(_accept(coordinator, f"n{n}") for n in numbers))
        taken = [await _quiet(coordinator, f"q{n}") for n in range(runs)]
        coordinator.begin_drain()
        feed.close()
        await coordinator.stop()
    return Latency.of(taken)


async def _accept(coordinator: Coordinator, session_id: str) -> None:
    """A run of the noisy tenant."""
    with coordinator.begin_accepted(session_id, tenant="noisy") as accepted:
        request = RunRequest(accepted.run_id, Prompt("two words"))
        await coordinator.run_accepted(accepted, request, allow_missing=True)


async def _quiet(coordinator: Coordinator, session_id: str) -> float:
    """The seconds of one run of the quiet tenant."""
    begun = time.perf_counter()
    await coordinator.run(session_id, Prompt("word"), tenant="quiet")
    return time.perf_counter() - begun


async def compare(waiting: int, runs: int) -> None:
    """Measures, and prints the results."""
    await measure(0, runs, NO_LIMIT)  # warm-up
    alone = await measure(0, runs, NO_LIMIT)
    print(f"alone                            {alone.against(alone)}")
    half = await measure(waiting, runs, Quota(max_active_runs=SLOTS // 2))
    print(f"{waiting} wait, at a quota of {SLOTS // 2:<5} {half.against(alone)}")
    free = await measure(waiting, runs, NO_LIMIT)
    print(f"{waiting} wait, without a quota    {free.against(alone)}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=500)
    options = parser.parse_args()
    asyncio.run(compare(options.waiting, options.runs))


if __name__ == "__main__":
    main()
