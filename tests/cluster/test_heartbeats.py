"""The pace of the heartbeats of a node."""

from __future__ import annotations

import pytest

from runlane_server.cluster.membership import heartbeat_pause
from runlane_server.store.postgres.renew import SILENT_FOR
from runlane_server.webhooks.dispatcher import LEASE_SECONDS


@pytest.mark.parametrize("lease", [0.5, 10.0, 20.0, 60.0, 3600.0])
def test_a_node_with_any_lease_is_seen_at_work(lease: float) -> None:
    """One heartbeat may fail before others take it for stopped."""
    pause, retry = heartbeat_pause(lease, failed=False), heartbeat_pause(lease, failed=True)
    assert pause <= lease / 4
    assert retry <= lease / 20
    assert (2 * pause + retry) * 1.25 < min(LEASE_SECONDS, SILENT_FOR.total_seconds())
