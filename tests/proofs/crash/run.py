"""Kills a server under load, round after round: `python -m proofs.crash.run --rounds 200 --seed 1`.

A round with a violation keeps its database, its log and its history in a folder.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from pathlib import Path

from proofs.crash.disk import Disk
from proofs.crash.report import play_in_folder
from proofs.crash.round import Plan, Report, play


def main() -> int:
    """Plays the rounds; returns 1 if any of them found a violation."""
    parser = argparse.ArgumentParser(prog="python -m proofs.crash.run", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="number of rounds")
    parser.add_argument(
        "--seed", default=str(time.time_ns() % 1_000_000), help="seed of all rounds"
    )
    parser.add_argument("--first", type=int, default=1, help="number of the first round")
    parser.add_argument("--power", action="store_true", help="make each kill a power cut; needs cc")
    return asyncio.run(_play_all(parser.parse_args()))


async def _play_all(options: argparse.Namespace) -> int:
    totals: Counter[str] = Counter()
    begun = time.monotonic()
    for number in range(options.first, options.first + options.rounds):
        report, kept = await _play(f"{options.seed}/{number}", power=options.power)
        totals.update(report.figures())
        totals["rounds"] += 1
        totals["failed rounds"] += kept is not None
        print(_line(report, kept), flush=True)
    print(f"\nseed {options.seed}: {time.monotonic() - begun:.0f} s")
    for name, total in totals.items():
        print(f"{name:24}{total:>10,}")
    return 1 if totals["failed rounds"] else 0


async def _play(seed: str, *, power: bool) -> tuple[Report, Path | None]:
    async def in_folder(folder: Path) -> Report:
        return await play(seed, folder, Disk(folder / "disk") if power else None)

    return await play_in_folder("runlane-crash-", in_folder, lambda: Report(Plan.draw(seed)))


def _line(report: Report, kept: Path | None) -> str:
    ends = ", ".join(f"{end} at {instant}" for end, instant in report.plan.ends)
    line = f"{report.plan.seed:>10}  {report.plan.agent:14}  {ends}; {report.accepts()}"
    return report.verdict(line, kept)


if __name__ == "__main__":
    sys.exit(main())
