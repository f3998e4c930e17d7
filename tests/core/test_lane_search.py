"""All interleavings of commands up to a depth; `python -m proofs.sim.explore` goes deeper."""

from __future__ import annotations

import pytest

from proofs.lanecheck.commands import Verb
from proofs.sim.explore import Bounds, explore


def test_no_interleaving_breaks_a_rule() -> None:
    """Three runs, two concurrent accepts: every lane within seven commands, and one more."""
    report = explore(8)
    print(f"\n{report}")
    assert report.verbs == set(Verb)
    assert report.states > 1_500
    assert report.transitions > 15_000
    assert report.refusals > 5_000


@pytest.mark.timeout(600)
def test_the_search_over_two_runs_is_complete() -> None:
    report = explore(40, Bounds(runs=2, reservations=2, waiting=1, nodes=1))
    print(f"\n{report}")
    assert report.complete
    assert report.verbs == set(Verb)
