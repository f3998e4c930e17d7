"""Simulated worlds: a short run of seeds, an exact replay, and mutants that must be found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from proofs.sim.mutants import MUTANTS, Mutant, planted
from proofs.sim.run import report
from proofs.sim.world import simulate

TESTS = Path(__file__).parents[2]

SEEDS = 200

MOST_SEEDS = 2_000
"""Number of worlds within which a mutant must be found."""


def test_simulated_worlds_break_no_rule() -> None:
    steps = 0
    for seed in range(SEEDS):
        outcome = simulate(seed)
        assert outcome.failure is None, "\n" + report(outcome)
        steps += outcome.counts["steps"]
    print(f"\n{SEEDS} seeds, {steps} steps")


def test_a_seed_reproduces_its_world() -> None:
    digests = {simulate(7).digest for _ in range(2)}
    code = "from proofs.sim.world import simulate; print(simulate(7).digest, end='')"
    for hash_seed in ("0", "1"):
        result = subprocess.run(
            [sys.executable, "-c", code],
            cwd=TESTS,
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(result.stdout)
    assert len(digests) == 1
    assert simulate(8).digest not in digests


def test_a_world_uses_no_socket_and_no_file() -> None:
    # The first world imports what it needs.
    code = """
import sys
from proofs.sim.world import simulate
simulate(7)
used = []
def note(event, args):
    if event == "open" or event.startswith(("socket.", "sqlite3.", "subprocess.", "os.")):
        used.append(event)
sys.addaudithook(note)
simulate(7)
print(used)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=TESTS, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "mutant", [it for it in MUTANTS if it.live == 1], ids=lambda mutant: mutant.name
)
def test_the_simulation_finds_the_mutant(mutant: Mutant) -> None:
    with planted(mutant):
        worlds = (simulate(seed) for seed in range(MOST_SEEDS))
        found = next((world for world in worlds if world.failure is not None), None)
    assert found is not None, "the mutant is not found"
    print(f"\n{found.seed + 1} seeds: {found.failure}")
    text = report(found)
    assert f"--start {found.seed}" in text
    assert str(found.failure) in text
