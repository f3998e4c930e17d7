"""All interleavings of commands up to a depth; `python -m proofs.sim.explore` goes deeper."""

from __future__ import annotations

from proofs.lanecheck.commands import Verb
from proofs.sim.explore import UPDATED, Bounds, explore


def test_no_interleaving_breaks_a_rule() -> None:
    """Three runs, two concurrent accepts: every lane within six commands, and one more."""
    report = explore(7)
    print(f"\n{report}")
    assert report.verbs == set(Verb) - {Verb.UPDATE}
    assert report.states > 1_500
    assert report.transitions > 15_000
    assert report.refusals > 5_000


def test_r46_no_interleaving_with_updates_of_a_queue_breaks_a_rule() -> None:
    report = explore(8, UPDATED)
    print(f"\n{report}")
    assert Verb.UPDATE in report.verbs
    assert report.states > 300
    assert report.refusals > 1_000


def test_the_search_over_two_plain_runs_is_complete() -> None:
    """With agents, nodes, questions or retries: tests/proofs/lanecheck."""
    report = explore(40, Bounds.plain())
    print(f"\n{report}")
    assert report.complete
