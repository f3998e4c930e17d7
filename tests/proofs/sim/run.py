"""Simulates worlds, one for each seed, and says what happened in the first that broke a rule.

cd tests && python -m proofs.sim.run --seeds 2000 --start 0
cd tests && python -m proofs.sim.run --seeds 1 --start 17 --trace
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from proofs.sim.world import Outcome, shortened, simulate

LAST = 60
"""How many lines of the trace of a failure are shown."""


def report(outcome: Outcome) -> str:
    """What is known of a failure, and how to see it again."""
    return "\n".join(
        [
            shortened(outcome.trace, LAST),
            f"seed {outcome.seed}: {outcome.failure}",
            "replay: cd tests && "
            f"python -m proofs.sim.run --seeds 1 --start {outcome.seed} --trace",
        ]
    )


def main() -> None:
    """Simulates as many worlds as asked; the exit code is 1 if one broke a rule."""
    parser = argparse.ArgumentParser(prog="proofs.sim.run", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="how many")
    parser.add_argument("--start", type=int, default=0, help="the first one")
    parser.add_argument("--trace", action="store_true", help="show all that happens")
    parser.add_argument("--keep-going", action="store_true", help="list all failures")
    told = parser.parse_args()
    began = time.perf_counter()
    totals: Counter[str] = Counter()
    failures = 0
    for seed in range(told.start, told.start + told.seeds):
        outcome = simulate(seed)
        totals.update(outcome.counts)
        if told.trace:
            sys.stdout.write(shortened(outcome.trace, len(outcome.trace)) + "\n")
        if outcome.failure is not None:
            failures += 1
            text = f"seed {seed}: {outcome.failure}" if told.keep_going else report(outcome)
            sys.stdout.write(text + "\n")
            if not told.keep_going:
                break
    seconds = time.perf_counter() - began
    figures = ", ".join(f"{count} {what}" for what, count in totals.items())
    sys.stdout.write(f"{told.seeds} seeds in {seconds:.1f} s: {figures}; {failures} failed\n")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
