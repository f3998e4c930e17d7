"""A short soak: ended streams and runs are released. `make soak` runs a long one."""

from __future__ import annotations

from pathlib import Path

from proofs.crash.soak import soak

BLOCK = 250


async def test_streams_and_runs_that_end_leave_nothing_behind(tmp_path: Path) -> None:
    """Memory is measured by the long soak: here the in-memory tail of the log still grows."""
    result = await soak(tmp_path, warm_up=1, blocks=2, block=BLOCK)
    print(f"\n{result.growth_kib:.0f} KiB for {BLOCK} streams and {BLOCK} runs: {result}")
    assert result.last.descriptors <= result.base.descriptors
    assert result.last.tasks <= result.base.tasks
