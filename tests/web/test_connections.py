"""The limits of the connections to the gateway."""

from __future__ import annotations

import resource

from runlane_web import connections


def test_connections_leave_half_of_the_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
    try:
        assert connections.max_connections() == 500
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_have_limits_in_all_and_for_each_address() -> None:
    counts = connections.Connections(limit=3, per_address=2)
    assert [counts.take("a") for _ in range(3)] == [True, True, False]
    assert [counts.take("b") for _ in range(2)] == [True, False]
    counts.release("a")
    assert counts.take("b")
