"""Shared by the probes of access control: documented roles, and expected outcomes."""

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
AGENTS = "/runlane.v1.AgentService/"
WEBHOOKS = "/runlane.v1.WebhookService/"
HARNESS = "/runlane.harness.v1.HarnessService/"

MIN_ROLE: Mapping[str, str] = {
    RUNS + "RunAccepted": "run",
    RUNS + "UpdateRun": "run",
    RUNS + "Cancel": "run",
    RUNS + "CancelAll": "run",
    RUNS + "SubscribeRunComplete": "read",
    RUNS + "SubscribeRun": "read",
    RUNS + "WaitRun": "read",
    RUNS + "GetRun": "read",
    RUNS + "ListRuns": "read",
    RUNS + "ListInputRequests": "read",
    RUNS + "AnswerInput": "answer",
    "/runlane.v1.AgentService/ListAgents": "read",
    SESSIONS + "CreateSession": "run",
    SESSIONS + "UpdateSession": "run",
    SESSIONS + "ForkSession": "run",
    SESSIONS + "GetSession": "read",
    SESSIONS + "DeleteSession": "admin",
    SESSIONS + "ListSessions": "read",
    SESSIONS + "ListMessages": "read",
    SESSIONS + "SubscribeSession": "read",
    AGENTS + "ListAgents": "read",
    **dict.fromkeys(
        (
            WEBHOOKS + "CreateWebhook",
            WEBHOOKS + "GetWebhook",
            WEBHOOKS + "ListWebhooks",
            WEBHOOKS + "UpdateWebhook",
            WEBHOOKS + "DeleteWebhook",
            WEBHOOKS + "RedeliverWebhook",
            WEBHOOKS + "RotateWebhookSecret",
        ),
        "webhooks",
    ),
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
"""The documented minimum role of each rpc."""

RIGHTS: Mapping[str, frozenset[str]] = {
    "read": frozenset({"read"}),
    "answer": frozenset({"read", "answer"}),
    "run": frozenset({"read", "run"}),
    "operator": frozenset({"read", "answer", "run"}),
    "webhooks": frozenset({"read", "webhooks"}),
    "work": frozenset(),
    "admin": frozenset({"read", "answer", "run", "webhooks", "admin"}),
}
"""The documented rights of each role: who starts runs does not answer their questions."""

Probe = Callable[[Path], Awaitable[None]]


class ProbeTimeout:
    """How long a probe waits for what must happen."""

    seconds = SECONDS


def assert_unauthenticated(found: Outcome) -> None:
    """Asserts the one error of every failed authentication, which does not say what is wrong."""
    assert (found.code, found.reason) == (StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"), found
    assert found.message == UNKNOWN_CALLER
