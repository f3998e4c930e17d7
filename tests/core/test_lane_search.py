"""All interleavings of commands up to a depth; `python -m proofs.sim.explore` goes deeper."""

from __future__ import annotations

from proofs.lanecheck.commands import Verb
from proofs.sim.explore import Bounds, explore


def test_no_interleaving_breaks_a_rule() -> None:
    """Three runs, two accepts at a time: every lane that seven commands lead to, and one more."""
    report = explore(8)
    print(f"\n{report}")
    assert report.verbs == set(Verb)
    assert report.states > 1_500
    assert report.transitions > 15_000
    assert report.refusals > 5_000


def test_two_runs_are_searched_to_the_end() -> None:
    report = explore(40, Bounds(runs=2, reservations=2, waiting=1))
    print(f"\n{report}")
    assert report.complete
    assert report.verbs == set(Verb)
