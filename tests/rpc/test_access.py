"""Who may do what, over the wire: every rpc, as everybody."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpc.access_probes import PROBES
from rpc.probe_base import LEAST
from runlane_server.access.permissions import REQUIRED_ROLES
from support.callers import METHODS, request


@pytest.mark.parametrize("name", PROBES)
async def test_what_has_to_hold(name: str, tmp_path: Path) -> None:
    await PROBES[name](tmp_path)


def test_every_rpc_is_looked_at() -> None:
    """An rpc that is new has to be added here; until then nobody may call it."""
    assert set(LEAST) == set(METHODS)
    assert set(REQUIRED_ROLES) - {one for one in REQUIRED_ROLES if "reflection" in one} == set(
        METHODS
    )
    for method in METHODS:
        assert type(request(method)).DESCRIPTOR is METHODS[method].input_type
