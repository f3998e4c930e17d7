"""Kills, stops and cuts off three nodes over one database under load, for a few seconds.
`make nodes` does so for any length of time."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("asyncpg", reason="asyncpg is not installed")

from proofs.crash.faults import WORKERS, FaultKind, Plan, PlannedFault
from proofs.crash.network import why_no_namespaces
from proofs.crash.nodes_round import play
from proofs.crash.nodes_run import surroundings
from support.postgres import fresh_database, skip_without_wheel

K = FaultKind

HITS = (
    (0.5, PlannedFault(0, K.KILL, 0.5)),
    (0.5, PlannedFault(1, K.PAUSE, 0.5)),
    (1.5, PlannedFault(2, K.LONG_CUT_STORE, 2.6, reset=True)),
    (2.5, PlannedFault(1, K.CUT_CLIENTS, 0.5)),
    (4.0, PlannedFault(1, K.LONG_PAUSE, 2.6)),
    (4.5, PlannedFault(0, K.DRAIN, 0.0)),
)


@pytest.mark.timeout(240)
async def test_faults_of_nodes_lose_no_accepted_run(tmp_path: Path) -> None:
    """R1, R4, R7, R9 to R11 and R20 to R25 hold across nodes."""
    skip_without_wheel()
    print(why_no_namespaces() or "in namespaces")
    plan = Plan("suite", seconds=6.0, lease=2.0, hits=HITS, actors=4)
    async with surroundings() as (network, base), fresh_database(base) as url:
        report = await play(plan, tmp_path, network, url)
    report.history.save(tmp_path / "history.jsonl")
    assert report.violations == []
    assert report.figures()["faults"] == len(HITS)
    assert report.history.acknowledged
    assert report.recoveries
    print(report.figures())


WORKER_HITS = (
    (1.0, PlannedFault(0, K.VANISH, 22.0)),
    (2.0, PlannedFault(3, K.KILL, 1.0)),
    (4.0, PlannedFault(4, K.CUT_CLIENTS, 4.0, reset=True)),
    (6.0, PlannedFault(5, K.PAUSE, 2.0)),
    (9.0, PlannedFault(1, K.DRAIN, 0.0)),
    (12.0, PlannedFault(4, K.DRAIN, 0.0)),
    (14.0, PlannedFault(2, K.LONG_PAUSE, 2.6)),
)


@pytest.mark.timeout(400)
async def test_faults_of_nodes_and_workers_lose_no_accepted_run(tmp_path: Path) -> None:
    """R33 to R37 hold too: a node that vanishes costs no run of a worker (R36)."""
    skip_without_wheel()
    plan = Plan("workers", seconds=24.0, lease=2.0, hits=WORKER_HITS, actors=4, workers=WORKERS)
    async with surroundings(workers=WORKERS) as (network, base), fresh_database(base) as url:
        report = await play(plan, tmp_path, network, url)
    report.history.save(tmp_path / "history.jsonl")
    assert report.violations == []
    figures = report.figures()
    assert figures["faults"] == len(WORKER_HITS)
    assert figures["completed by workers"]
    assert figures["continued on another node"]
    print(figures)
