"""Three nodes over one PostgreSQL, killed, stopped and cut off under load, round after round:
`python -m proofs.crash.nodes_run --minutes 10 --seed 7`.

A round with a violation keeps its logs and its history in a folder. To repeat it, pass
`--first NUMBER --rounds 1` and the same seed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from proofs.crash.faults import NODES, Plan
from proofs.crash.network import Network, namespaces, open_to, proxies, why_no_namespaces
from proofs.crash.nodes_round import Report, play
from proofs.crash.report import play_in_folder
from support.postgres import OTHER_SERVER, OwnPostgres, fresh_database, own_postgres


def main() -> int:
    """Plays the rounds; returns 1 if any of them found a violation."""
    parser = argparse.ArgumentParser(prog="python -m proofs.crash.nodes_run", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=2.0, help="minutes after which no round starts"
    )
    parser.add_argument("--rounds", type=int, default=10_000, help="maximum number of rounds")
    parser.add_argument(
        "--seed", default=str(time.time_ns() % 1_000_000), help="seed of all rounds"
    )
    parser.add_argument("--first", type=int, default=1, help="number of the first round")
    parser.add_argument("--seconds", type=float, default=40.0, help="seconds of load per round")
    parser.add_argument("--workers", type=int, default=0, help="number of workers")
    parser.add_argument("--lease", type=float, default=2.0, help="lease of the nodes in seconds")
    parser.add_argument(
        "--proxies", action="store_true", help="use proxies even if namespaces are possible"
    )
    return asyncio.run(_play_all(parser.parse_args()))


@dataclass(slots=True)
class Totals:
    """The results of all rounds."""

    figures: Counter[str] = field(default_factory=Counter)
    recoveries: list[float] = field(default_factory=list)

    def add(self, report: Report, kept: Path | None) -> None:
        """Adds a round, and the folder of its files if it found a violation."""
        self.figures.update(report.figures())
        self.figures["rounds"] += 1
        self.figures["failed rounds"] += kept is not None
        self.recoveries += report.recoveries


@asynccontextmanager
async def surroundings(
    *, own_proxies: bool = False, workers: int = 0
) -> AsyncIterator[tuple[Network, str]]:
    """A network for nodes and workers, and the URL of a database."""
    other = os.environ.get(OTHER_SERVER)
    async with AsyncExitStack() as stack:
        if other or own_proxies or why_no_namespaces():
            network: Network = await stack.enter_async_context(proxies(NODES, workers))
            yield network, other or stack.enter_context(own_postgres()).url
            return
        spaces = stack.enter_context(namespaces(NODES + workers))
        server = OwnPostgres()
        stack.callback(server.remove)
        open_to(server, spaces)
        server.start()
        yield spaces, server.url


async def _play_all(options: argparse.Namespace) -> int:
    totals = Totals()
    begun = time.monotonic()
    why = why_no_namespaces()
    if why or options.proxies:
        print(f"connections are cut by proxies{': ' * bool(why)}{why}")
    own, workers = options.proxies, options.workers
    async with surroundings(own_proxies=own, workers=workers) as (network, base):
        for number in range(options.first, options.first + options.rounds):
            if time.monotonic() - begun > options.minutes * 60:
                break
            plan = Plan.draw(f"{options.seed}/{number}", options.seconds, options.lease, workers)
            async with fresh_database(base) as url:
                report, kept = await _play(plan, network, url)
            totals.add(report, kept)
            print(_line(report, kept), flush=True)
    minutes = (time.monotonic() - begun) / 60
    print(f"\nseed {options.seed}: {minutes:.1f} minutes, lease {options.lease:g} s")
    for name, total in totals.figures.items():
        print(f"{name:24}{total:>10,}")
    print(f"{'failover, s':24}{_spread(totals.recoveries):>10}")
    return 1 if totals.figures["failed rounds"] else 0


async def _play(plan: Plan, network: Network, url: str) -> tuple[Report, Path | None]:
    async def in_folder(folder: Path) -> Report:
        return await play(plan, folder, network, url)

    return await play_in_folder("runlane-nodes-", in_folder, lambda: Report(plan))


def _spread(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    ordered = sorted(seconds)
    return f"p50 {ordered[len(ordered) // 2]:.2f}, max {ordered[-1]:.2f}"


def _line(report: Report, kept: Path | None) -> str:
    kinds = Counter(fault.kind for fault in report.history.faults)
    faults = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    failover = _spread(report.recoveries)
    line = f"{report.plan.seed:>10}  {report.accepts()}, failover {failover}; {faults}"
    return report.verdict(line, kept)


if __name__ == "__main__":
    sys.exit(main())
