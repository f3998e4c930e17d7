"""What the probes of the door share: the roles that are promised, and what is expected."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from grpc import StatusCode

from runlane_server.access.access_file import UNKNOWN_CALLER
from support.callers import (
    SECONDS,
    Outcome,
)

RUNS, SESSIONS = "/runlane.v1.RunService/", "/runlane.v1.SessionService/"
HARNESS = "/runlane.harness.v1.HarnessService/"

LEAST: Mapping[str, str] = {
    RUNS + "RunAccepted": "run",
    RUNS + "Cancel": "run",
    RUNS + "CancelAll": "run",
    RUNS + "SubscribeRunComplete": "read",
    RUNS + "SubscribeRun": "read",
    RUNS + "WaitRun": "read",
    RUNS + "GetRun": "read",
    RUNS + "ListRuns": "read",
    SESSIONS + "CreateSession": "run",
    SESSIONS + "GetSession": "read",
    SESSIONS + "DeleteSession": "admin",
    SESSIONS + "ListSessions": "read",
    SESSIONS + "ListMessages": "read",
    **dict.fromkeys(
        (
            HARNESS + "GetServer",
            HARNESS + "ArmGate",
            HARNESS + "AwaitGate",
            HARNESS + "ReleaseGate",
            HARNESS + "ListGates",
            HARNESS + "AdvanceClock",
            HARNESS + "Crash",
            HARNESS + "Drain",
        ),
        "admin",
    ),
}
"""The least role for each rpc, as it is promised."""

Probe = Callable[[Path], Awaitable[None]]


class Patience:
    """For how many seconds something is waited for that has to happen."""

    seconds = SECONDS


def refused_as_unknown(found: Outcome) -> None:
    """The caller is told that it is not known, and nothing else, whatever is wrong."""
    assert (found.code, found.reason) == (StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"), found
    assert found.message == UNKNOWN_CALLER
