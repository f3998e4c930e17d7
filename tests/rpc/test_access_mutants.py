"""Checks that are taken out, one after the other: the probes are worth what they notice."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from proofs.sim.mutants import Mutant, planted
from rpc.access_mutants import REMOVED, Removed
from rpc.access_probes import PROBES
from rpc.probe_base import Patience


@pytest.mark.parametrize("removed", REMOVED, ids=lambda one: one.name)
async def test_a_check_that_is_missing_is_noticed(
    removed: Removed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant = Mutant(
        removed.name, cast("type", removed.owner), removed.function, removed.old, removed.new
    )
    # What does not happen need not be waited for as long as what has to.
    monkeypatch.setattr(Patience, "seconds", 2.0)
    with planted(mutant):
        noticed = False
        try:
            await PROBES[removed.noticed_by](tmp_path)
        except (AssertionError, TimeoutError):
            noticed = True
    assert noticed


def test_every_probe_notices_something() -> None:
    """`probes_and_lists` looks at what the others rely on."""
    assert {one.noticed_by for one in REMOVED} | {"probes_and_lists"} == set(PROBES)
