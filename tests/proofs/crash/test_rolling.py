"""Restarts three nodes over PostgreSQL under runs of workers. `make rolling` does so with more."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("asyncpg", reason="asyncpg is not installed")

from proofs.crash.rolling import roll
from support.postgres import skip_without_wheel

RUNS = 150
"""So many that a node recovers the last one of a stopped node seconds after it stopped, when its
worker has long connected to another node."""


@pytest.mark.timeout(240)
async def test_r36_a_recovery_takes_no_run_from_the_node_where_its_worker_is_now(
    tmp_path: Path,
) -> None:
    skip_without_wheel()
    await roll("postgresql", RUNS, 1, tmp_path)
