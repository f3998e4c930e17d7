"""The runs of a node that is gone are recovered soon, however many they are."""

from __future__ import annotations

import pytest

from support.postgres import own_postgres

pytest.importorskip("asyncpg")

from proofs.nodes.failover import measure


@pytest.mark.parametrize(("runs", "most"), [(2_000, 5.0), (10_000, 20.0)])
async def test_r21_two_survivors_recover_all_runs_of_a_node(runs: int, most: float) -> None:
    with own_postgres() as server:
        seconds = await measure(server, runs)
    print(f"{runs:,} runs in {seconds:.1f} s")
    assert seconds < most
