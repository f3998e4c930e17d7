"""Audit lines: who cancelled, answered or deleted what.

They are lines of the log at INFO with `logger` "runlane.audit", by which a collector keeps them
apart. Accepts have none: they are as many as runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import structlog

from runlane_server.access.caller import Caller

log = structlog.get_logger()

LOGGER = "runlane.audit"

_CHANGES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "/runlane.v1.RunService/Cancel": ("session_id", "run_id"),
        "/runlane.v1.RunService/CancelAll": (),
        "/runlane.v1.RunService/UpdateRun": ("run_id",),
        "/runlane.v1.RunService/AnswerInput": ("input_request_id",),
        "/runlane.v1.SessionService/UpdateSession": ("session_id",),
        "/runlane.v1.SessionService/DeleteSession": ("session_id",),
        "/runlane.v1.WebhookService/CreateWebhook": (),
        "/runlane.v1.WebhookService/UpdateWebhook": ("webhook_id",),
        "/runlane.v1.WebhookService/DeleteWebhook": ("webhook_id",),
        "/runlane.v1.WebhookService/RedeliverWebhook": ("webhook_id",),
        "/runlane.v1.WebhookService/RotateWebhookSecret": ("webhook_id",),
    }
)
"""The methods that are audited, and the fields of their requests in a line: ids, no content."""


def is_audited(method: str) -> bool:
    """Whether successful calls of a method are audited, by its full path."""
    return method in _CHANGES


def record(method: str, caller: Caller, peer: str, request: Any) -> None:
    """Logs a call that was carried out."""
    ids = {name: found for name in _CHANGES[method] if (found := getattr(request, name))}
    log.info(
        "audit",
        logger=LOGGER,
        method=method.rpartition(".")[2],
        tenant=caller.tenant,
        caller=caller.name,
        peer=peer,
        **ids,
    )
