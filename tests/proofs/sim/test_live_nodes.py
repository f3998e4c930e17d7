"""Worlds of several nodes that share a store: a run of seeds, and mutants that must be found."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from proofs.sim.mutants import MUTANTS, Mutant, planted
from proofs.sim.run import report
from proofs.sim.world import simulate

MOST_SEEDS = 600
"""Number of worlds within which a mutant must be found."""


@pytest.mark.parametrize(("live", "seeds"), [(2, 100), (3, 60)])
def test_nodes_that_share_a_store_break_no_rule(live: int, seeds: int) -> None:
    lost = 0
    for seed in range(seeds):
        outcome = simulate(seed, live)
        assert outcome.failure is None, "\n" + report(outcome)
        lost += outcome.counts["lost nodes"]
    assert lost > 0


@pytest.mark.parametrize(
    ("live", "seeds"),
    [
        (2, range(60)),
        # A lane with two slots; a worker that ended its turn at a node that was cut off.
        (3, (61, 2140)),
    ],
)
def test_nodes_that_are_cut_off_from_the_store_break_no_rule(
    live: int, seeds: Sequence[int]
) -> None:
    for seed in seeds:
        outcome = simulate(seed, live, cuts=True)
        assert outcome.failure is None, "\n" + report(outcome)


def test_a_seed_reproduces_a_world_of_several_nodes() -> None:
    assert len({simulate(7, 3).digest for _ in range(2)}) == 1
    assert simulate(7, 2).digest != simulate(7, 3).digest


@pytest.mark.parametrize(
    "mutant", [it for it in MUTANTS if it.live > 1], ids=lambda mutant: mutant.name
)
def test_the_simulation_finds_the_mutant(mutant: Mutant) -> None:
    with planted(mutant):
        worlds = (simulate(seed, mutant.live) for seed in range(MOST_SEEDS))
        found = next((world for world in worlds if world.failure is not None), None)
    assert found is not None, "the mutant is not found"
    print(f"\n{found.seed + 1} seeds: {found.failure}")
    text = report(found)
    assert f"--start {found.seed} --nodes {mutant.live}" in text
