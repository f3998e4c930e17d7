"""The role that each method requires. A method that is not listed is denied to everybody."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from runlane_server.access.caller import Role

_RUNS = "/runlane.v1.RunService/"
_SESSIONS = "/runlane.v1.SessionService/"
_AGENTS = "/runlane.v1.AgentService/"
_WEBHOOKS = "/runlane.v1.WebhookService/"
_WORKER = "/runlane.worker.v1.WorkerService/"
_HARNESS = "/runlane.harness.v1.HarnessService/"

REQUIRED_ROLES: Mapping[str, Role] = MappingProxyType(
    {
        _RUNS + "RunAccepted": Role.RUN,
        _RUNS + "UpdateRun": Role.RUN,
        _RUNS + "Cancel": Role.RUN,
        _RUNS + "CancelAll": Role.RUN,
        _RUNS + "SubscribeRunComplete": Role.READ,
        _RUNS + "SubscribeRun": Role.READ,
        _RUNS + "WaitRun": Role.READ,
        _RUNS + "GetRun": Role.READ,
        _RUNS + "ListRuns": Role.READ,
        _RUNS + "ListInputRequests": Role.READ,
        _RUNS + "AnswerInput": Role.ANSWER,
        _SESSIONS + "CreateSession": Role.RUN,
        _SESSIONS + "ForkSession": Role.RUN,
        _SESSIONS + "GetSession": Role.READ,
        _SESSIONS + "UpdateSession": Role.RUN,
        _SESSIONS + "DeleteSession": Role.ADMIN,
        _SESSIONS + "ListSessions": Role.READ,
        _SESSIONS + "ListMessages": Role.READ,
        _SESSIONS + "SubscribeSession": Role.READ,
        _AGENTS + "ListAgents": Role.READ,
        _WEBHOOKS + "CreateWebhook": Role.WEBHOOKS,
        _WEBHOOKS + "GetWebhook": Role.WEBHOOKS,
        _WEBHOOKS + "ListWebhooks": Role.WEBHOOKS,
        _WEBHOOKS + "UpdateWebhook": Role.WEBHOOKS,
        _WEBHOOKS + "DeleteWebhook": Role.WEBHOOKS,
        _WEBHOOKS + "RedeliverWebhook": Role.WEBHOOKS,
        _WEBHOOKS + "RotateWebhookSecret": Role.WEBHOOKS,
        _WORKER + "Work": Role.WORK,
        _HARNESS + "GetServer": Role.ADMIN,
        _HARNESS + "ArmGate": Role.ADMIN,
        _HARNESS + "AwaitGate": Role.ADMIN,
        _HARNESS + "ReleaseGate": Role.ADMIN,
        _HARNESS + "ListGates": Role.ADMIN,
        _HARNESS + "AdvanceClock": Role.ADMIN,
        _HARNESS + "Crash": Role.ADMIN,
        _HARNESS + "Drain": Role.ADMIN,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Role.READ,
    }
)
"""The role that may call each method, by full name; a higher one may too."""

PUBLIC_METHODS = frozenset(f"/grpc.health.v1.Health/{name}" for name in ("Check", "List", "Watch"))
"""Methods without authentication: probes of load balancers and orchestrators have no identity."""

NODE_METHODS = frozenset({_RUNS + "SubscribeRun"})
"""Methods that another node of the same store may call, each for the one run that it signed for."""

RUN_WEBHOOKS = frozenset(
    _WEBHOOKS + name for name in ("CreateWebhook", "GetWebhook", "ListWebhooks", "DeleteWebhook")
)
"""Methods that a caller who starts runs may call too, for webhooks of single runs: the service
checks that (`may_manage_webhooks`)."""

_GRANTS: Mapping[Role, frozenset[Role]] = MappingProxyType(
    {
        Role.READ: frozenset({Role.READ}),
        Role.ANSWER: frozenset({Role.READ, Role.ANSWER}),
        Role.RUN: frozenset({Role.READ, Role.RUN}),
        Role.OPERATOR: frozenset({Role.READ, Role.ANSWER, Role.RUN, Role.OPERATOR}),
        Role.WEBHOOKS: frozenset({Role.READ, Role.WEBHOOKS}),
        Role.WORK: frozenset({Role.WORK}),
        Role.ADMIN: frozenset(Role),
    }
)
"""The roles whose methods each role may call. A role that starts or executes runs cannot answer
their questions."""


def is_allowed(role: Role, method: str) -> bool:
    """Whether a role may call a method."""
    required = REQUIRED_ROLES.get(method)
    if required is None:
        return False
    granted = _GRANTS[role]
    return required in granted or (method in RUN_WEBHOOKS and Role.RUN in granted)


def may_manage_webhooks(roles: Iterable[Role]) -> bool:
    """Whether a caller with these roles may manage webhooks other than those of single runs."""
    return any(Role.WEBHOOKS in _GRANTS[role] for role in roles)
