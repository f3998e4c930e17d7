"""Webhooks of single runs on the wire."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType

from runlane.v1 import webhook_service_pb2 as pb
from runlane_server.rpc.checks import Checks
from runlane_server.store.webhooks import A2A, STANDARD, OfRun

TOKEN_HEADER = "X-A2A-Notification-Token"  # noqa: S105 - the name of a header

MAX_HEADER_BYTES = 4_096

FORMATS: Mapping[str, pb.WebhookFormat.ValueType] = MappingProxyType(
    {STANDARD: pb.WEBHOOK_FORMAT_STANDARD, A2A: pb.WEBHOOK_FORMAT_A2A}
)
_FORMATS_FROM: Mapping[int, str] = {number: name for name, number in FORMATS.items()}

# Nothing of a value can end the line of its header.
_AUTHORIZATION = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+ [!-~]([ -~]*[!-~])?")
_TOKEN = re.compile(r"[!-~]([ -~]*[!-~])?")


def read_run(checks: Checks, sent: pb.WebhookRun) -> OfRun:
    """Reads what binds a new webhook to a run."""
    if not sent.run_id:
        checks.reject("run.run_id", "is missing")
    checks.identifier("run.run_id", sent.run_id)
    checks.identifier("run.name", sent.name)
    number = sent.format or pb.WEBHOOK_FORMAT_STANDARD
    form = checks.enum("run.format", number, _FORMATS_FROM.get, STANDARD)
    if sent.notification_token and form != A2A:
        checks.reject("run.notification_token", "needs the format A2A")
    headers = {
        "Authorization": _header(checks, "run.authorization", sent.authorization, _AUTHORIZATION),
        TOKEN_HEADER: _header(checks, "run.notification_token", sent.notification_token, _TOKEN),
    }
    headers = {name: value for name, value in headers.items() if value}
    return OfRun(
        sent.run_id,
        sent.name,
        form,
        headers=json.dumps(headers) if headers else "",
        scheme=sent.authorization.partition(" ")[0],
    )


def write_run(of_run: OfRun | None) -> pb.WebhookRun | None:
    """The part that a response has: no secrets."""
    if of_run is None:
        return None
    return pb.WebhookRun(
        run_id=of_run.run_id,
        name=of_run.name,
        format=FORMATS[of_run.format],
        authorization=of_run.scheme,
    )


def _header(checks: Checks, field: str, value: str, form: re.Pattern[str]) -> str:
    checks.size(field, value, MAX_HEADER_BYTES)
    if value and len(value) <= MAX_HEADER_BYTES and not form.fullmatch(value):
        scheme = "a scheme, a space and " if form is _AUTHORIZATION else ""
        checks.reject(field, f"must be {scheme}printable ASCII")
    return value
