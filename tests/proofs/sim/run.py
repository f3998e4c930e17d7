"""Simulates a world for each seed, and prints the trace of the first one that breaks a rule.

cd tests && python -m proofs.sim.run --seeds 2000 --start 0
cd tests && python -m proofs.sim.run --seeds 1 --start 17 --nodes 3 --trace
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from proofs.sim.world import Outcome, shortened, simulate

LAST = 60
"""Number of lines shown of the trace of a failure."""


def report(outcome: Outcome) -> str:
    """The trace of a failure, and the command that replays it."""
    nodes = f" --nodes {outcome.live}" if outcome.live > 1 else ""
    return "\n".join(
        [
            shortened(outcome.trace, LAST),
            f"seed {outcome.seed}: {outcome.failure}",
            "replay: cd tests && "
            f"python -m proofs.sim.run --seeds 1 --start {outcome.seed}{nodes} --trace",
        ]
    )


def main() -> None:
    """Simulates worlds; the exit code is 1 if one broke a rule."""
    parser = argparse.ArgumentParser(prog="proofs.sim.run", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="number of worlds")
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.add_argument("--nodes", type=int, default=1, help="number of live nodes")
    parser.add_argument("--cuts", action="store_true", help="cut nodes off from the store")
    parser.add_argument("--trace", action="store_true", help="print the whole trace")
    parser.add_argument(
        "--keep-going",
        action="store_true",
        help="list all failures",
    )
    options = parser.parse_args()
    began = time.perf_counter()
    totals: Counter[str] = Counter()
    failures = 0
    for seed in range(options.start, options.start + options.seeds):
        outcome = simulate(seed, options.nodes, cuts=options.cuts)
        totals.update(outcome.counts)
        if options.trace:
            sys.stdout.write(shortened(outcome.trace, len(outcome.trace)) + "\n")
        if outcome.failure is not None:
            failures += 1
            text = f"seed {seed}: {outcome.failure}" if options.keep_going else report(outcome)
            sys.stdout.write(text + "\n")
            if not options.keep_going:
                break
    seconds = time.perf_counter() - began
    figures = ", ".join(f"{count} {what}" for what, count in totals.items())
    sys.stdout.write(f"{options.seeds} seeds in {seconds:.1f} s: {figures}; {failures} failed\n")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
