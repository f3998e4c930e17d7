"""Errors as `google.rpc.Status` in JSON, with the HTTP code of their gRPC code."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from google.protobuf import any_pb2, duration_pb2, json_format
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]
from starlette.responses import Response

from runlane.errors import RunlaneError, Violation

DOMAIN = "runlane"

HTTP_CODES: Mapping[int, int] = MappingProxyType(
    {
        code_pb2.CANCELLED: 499,
        code_pb2.UNKNOWN: 500,
        code_pb2.INVALID_ARGUMENT: 400,
        code_pb2.DEADLINE_EXCEEDED: 504,
        code_pb2.NOT_FOUND: 404,
        code_pb2.ALREADY_EXISTS: 409,
        code_pb2.PERMISSION_DENIED: 403,
        code_pb2.RESOURCE_EXHAUSTED: 429,
        code_pb2.FAILED_PRECONDITION: 400,
        code_pb2.ABORTED: 409,
        code_pb2.OUT_OF_RANGE: 400,
        code_pb2.UNIMPLEMENTED: 501,
        code_pb2.INTERNAL: 500,
        code_pb2.UNAVAILABLE: 503,
        code_pb2.DATA_LOSS: 500,
        code_pb2.UNAUTHENTICATED: 401,
    }
)
"""HTTP code of each gRPC code, as `google/rpc/code.proto` states them."""


class Refused(Exception):
    """A request that the gateway itself refuses.

    Attributes:
        status: The error.
        http: The HTTP code, where it is not that of the gRPC code.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        *,
        field: str = "",
        http: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = make_status(code, reason, message, field=field)
        self.http = http
        self.headers = dict(headers or {})

    def response(self) -> Response:
        """The answer."""
        return to_response(self.status, http=self.http, headers=self.headers)


def invalid(field: str, problem: str) -> Refused:
    """The error of a field that cannot be taken."""
    message = f"{field}: {problem}"
    return Refused(code_pb2.INVALID_ARGUMENT, "INVALID_ARGUMENT", message, field=field)


def shown(text: str, length: int = 64) -> str:
    """The caller's value, safe to be shown."""
    return "".join(char if char.isprintable() else "?" for char in text[:length]) or "(empty)"


def make_status(code: int, reason: str, message: str, *, field: str = "") -> status_pb2.Status:
    """Makes a status with the details that the server's own errors have."""
    status = status_pb2.Status(code=code, message=message)
    _add(status, error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))
    if field:
        _add_violations(status, [Violation(field, message.removeprefix(f"{field}: "))])
    return status


def from_error(error: RunlaneError) -> status_pb2.Status:
    """The status of a failed call, with all details that the server sent."""
    code = error.status.value[0]
    reason = error.reason or error.status.name
    status = status_pb2.Status(code=code, message=error.message)
    _add(
        status,
        error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=dict(error.metadata)),
    )
    if error.violations:
        _add_violations(status, error.violations)
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromTimedelta(error.retry_after)
        _add(status, error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def _add(status: status_pb2.Status, detail: Message) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def _add_violations(status: status_pb2.Status, violations: Iterable[Violation]) -> None:
    found = [
        error_details_pb2.BadRequest.FieldViolation(field=each.field, description=each.description)
        for each in violations
    ]
    _add(status, error_details_pb2.BadRequest(field_violations=found))


def to_json(status: status_pb2.Status) -> str:
    """The status as JSON on one line."""
    return json.dumps(json_format.MessageToDict(status), ensure_ascii=False)


def to_response(
    status: status_pb2.Status, *, http: int = 0, headers: Mapping[str, str] | None = None
) -> Response:
    """The HTTP answer for a status."""
    code = http or HTTP_CODES.get(status.code, 500)
    more = dict(headers or {})
    if code == 401:
        more.setdefault("WWW-Authenticate", "Bearer")
    delay = _retry_delay(status)
    if delay is not None:
        more["Retry-After"] = str(delay)
    return Response(to_json(status), code, more, "application/json")


def _retry_delay(status: status_pb2.Status) -> int | None:
    """Seconds after which a retry helps, rounded up; None if the server did not say."""
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(retry):
            seconds: float = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
            return max(1, math.ceil(seconds))
    return None
