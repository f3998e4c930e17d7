"""Mutation test of the access probes: each removed check must fail a probe."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from proofs.sim.mutants import Mutant, planted
from rpc.access_mutants import REMOVED, Removed
from rpc.access_probes import PROBES
from rpc.probe_base import ProbeTimeout


@pytest.mark.parametrize("removed", REMOVED, ids=lambda one: one.name)
async def test_a_removed_check_fails_its_probe(
    removed: Removed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant = Mutant(
        removed.name, cast("type", removed.owner), removed.function, removed.old, removed.new
    )
    # A probe that waits in vain should fail soon.
    monkeypatch.setattr(ProbeTimeout, "seconds", 2.0)
    with planted(mutant):
        detected = False
        try:
            await PROBES[removed.detected_by](tmp_path)
        except (AssertionError, TimeoutError):
            detected = True
    assert detected


def test_every_probe_detects_a_removed_check() -> None:
    """Except `health_and_reflection`, which checks what the others rely on."""
    assert {one.detected_by for one in REMOVED} | {"health_and_reflection"} == set(PROBES)
