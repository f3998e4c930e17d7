"""Searches that end: every lane that two runs can lead to, and every command on each of them."""

from __future__ import annotations

import pytest

from proofs.sim.explore import Bounds, explore

COMPLETE = {
    "agents": Bounds.plain(agents=True),
    "nodes": Bounds.plain(nodes=True),
    "asks": Bounds.plain(asks=True),
    "retries": Bounds.plain(retries=True),
    "updates": Bounds.plain(updates=True),
}
"""Each with one of what multiplies the lanes; tests/core searches for a few steps with all."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("added", COMPLETE)
def test_the_search_over_two_runs_is_complete(added: str) -> None:
    report = explore(40, COMPLETE[added])
    print(f"\n{added}: {report}")
    assert report.complete
