"""Kills a server under load a few times. `make crash` plays any number of rounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from proofs.crash.round import End, play


@pytest.mark.parametrize(
    "ends",
    [
        ((End.KILL, 150),),
        ((End.KILL, 90), (End.KILL, 200)),
        ((End.TWO_KILLS, 200), (End.KILL, 210)),
        ((End.KILL_AT_START, 150),),
        ((End.KILL_IN_DRAIN, 150),),
        ((End.DRAIN, 150),),
    ],
    ids=lambda ends: ends[0][0].value,
)
async def test_a_killed_server_loses_no_accepted_run(
    tmp_path: Path, ends: tuple[tuple[End, int], ...]
) -> None:
    """R1, R4, R7, R10, R11 and R20 to R25 hold after kills at any time."""
    report = await play(f"suite {ends[0][0]}", tmp_path, ends=ends)
    report.history.save(tmp_path / "history.jsonl")
    assert report.violations == []
    assert report.history.acknowledged
    assert report.history.final.log
    print(report.figures())
