"""Access control over the wire: every rpc with every kind of caller."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpc.access_probes import PROBES
from rpc.probe_base import MIN_ROLE
from runlane_server.access.caller import Role
from runlane_server.access.permissions import REQUIRED_ROLES, is_allowed
from support.callers import METHODS, request

WORK = "/runlane.worker.v1.WorkerService/Work"

OF_STREAMS = {WORK, *(one for one in REQUIRED_ROLES if "reflection" in one)}
"""Rpcs whose requests are a stream. tests/e2e/test_workers.py has those of a worker."""


@pytest.mark.parametrize("role", Role)
def test_a_worker_may_work_and_nothing_else(role: Role) -> None:
    assert is_allowed(role, WORK) == (role in {Role.WORK, Role.ADMIN})
    if role is Role.WORK:
        assert [method for method in REQUIRED_ROLES if is_allowed(role, method)] == [WORK]


@pytest.mark.parametrize("name", PROBES)
async def test_access_probe_passes(name: str, tmp_path: Path) -> None:
    await PROBES[name](tmp_path)


def test_every_rpc_has_a_role_and_a_request() -> None:
    """A new rpc must be added to the tables; until then it is denied to everybody."""
    assert set(MIN_ROLE) == set(METHODS)
    assert set(REQUIRED_ROLES) - OF_STREAMS == set(METHODS)
    for method in METHODS:
        assert type(request(method)).DESCRIPTOR is METHODS[method].input_type
