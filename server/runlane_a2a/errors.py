"""Errors on the three transports: one table from exceptions to statuses and codes.

Every error has the `ErrorInfo` of A2A (domain `a2a-protocol.org`), if A2A knows the error, and ours
(domain `runlane`). The server's words about fields and retries stay.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from a2a.utils.errors import (
    A2A_ERROR_MAPPING,
    JSON_RPC_ERROR_CODE_MAP,
    A2AError,
    ContentTypeNotSupportedError,
    InternalError,
    InvalidParamsError,
    InvalidRequestError,
    JSONParseError,
    TaskNotFoundError,
    UnsupportedOperationError,
)
from google.protobuf import any_pb2, json_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]

from runlane import errors
from runlane.errors import RunlaneError
from runlane_web.errors import HTTP_CODES, Refused, from_error

log = logging.getLogger("runlane_a2a")

DOMAIN = "a2a-protocol.org"

SERVER_ERROR = -32000
"""JSON-RPC code of errors that A2A has no code for: limits, and servers that are away."""

_KINDS: tuple[tuple[type[RunlaneError], type[A2AError]], ...] = (
    (errors.RunNotFound, TaskNotFoundError),
    (errors.RunDeleted, TaskNotFoundError),
    (errors.SessionNotFound, TaskNotFoundError),
    (errors.InvalidArgument, InvalidParamsError),
    (errors.RunIdConflict, InvalidParamsError),
    (errors.InputNotFound, InvalidParamsError),
    (errors.InputClosed, UnsupportedOperationError),
    (errors.Internal, InternalError),
)
"""The errors of the server that A2A has a name for; the first that matches."""

_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "session_id": "contextId",
        "prompt": "message.parts",
        "attachments": "message.parts",
        "metadata": "message.metadata",
        "run_id": "id",
        "page_size": "pageSize",
        "page_token": "pageToken",
        "answer": "message.parts",
        "run.authorization": "authentication",
        "run.name": "id",
        "run.notification_token": "token",
    }
)
"""The A2A field for each field of ours that a caller can set."""


def refuse(kind: type[A2AError], message: str, *, field: str = "", reason: str = "") -> A2AError:
    """Makes an error that names a field, and our reason."""
    named = f"{field}: {message}" if field else message
    return kind(named, {"field": field, "reason": reason})


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as the transports send it.

    Attributes:
        status: Code of gRPC, message and details.
        http: HTTP status code.
        json_rpc: JSON-RPC error code.
    """

    status: status_pb2.Status
    http: int
    json_rpc: int

    def details(self) -> list[dict[str, Any]]:
        """The details as JSON."""
        return [_detail(each) for each in self.status.details]

    @property
    def retry_after(self) -> int | None:
        """Seconds after which a retry helps, rounded up; None if nobody knows."""
        retry = error_details_pb2.RetryInfo()
        for detail in self.status.details:
            if detail.Unpack(retry):
                delay: Duration = retry.retry_delay
                return max(1, math.ceil(delay.seconds + delay.nanos / 1e9))
        return None


def to_failure(error: Exception) -> Failure:
    """Converts an exception; one that nobody expects is logged, and its text stays in the log."""
    if isinstance(error, A2AError):
        return _of_a2a(error)
    if isinstance(error, RunlaneError):
        return _of_runlane(error)
    if isinstance(error, Refused):
        return _of_refused(error)
    error_id = secrets.token_hex(8)
    log.error("internal error %s", error_id, exc_info=error)
    message = f"internal error {error_id}; the log of the gateway has the details"
    return _of_a2a(InternalError(message))


def rest_body(failure: Failure) -> dict[str, Any]:
    """The body of an error of the REST transport (https://google.aip.dev/193)."""
    return {
        "error": {
            "code": failure.http,
            "status": code_pb2.Code.Name(failure.status.code),
            "message": failure.status.message,
            "details": failure.details(),
        }
    }


def json_rpc_error(failure: Failure) -> dict[str, Any]:
    """The member `error` of a JSON-RPC response."""
    return {
        "code": failure.json_rpc,
        "message": failure.status.message,
        "data": failure.details(),
    }


def _of_a2a(error: A2AError) -> Failure:
    known = A2A_ERROR_MAPPING.get(type(error))
    if isinstance(error, JSONParseError):
        known = A2A_ERROR_MAPPING[InvalidRequestError]
    if known is None:
        known = A2A_ERROR_MAPPING[InternalError]
    status = status_pb2.Status(code=code_pb2.Code.Value(known.grpc_status), message=error.message)
    _add(status, error_details_pb2.ErrorInfo(reason=known.reason, domain=DOMAIN))
    data = error.data or {}
    if data.get("reason"):
        _add(status, error_details_pb2.ErrorInfo(reason=data["reason"], domain="runlane"))
    violations = [(each["field"], each["message"]) for each in data.get("errors", ())]
    if data.get("field"):
        violations.append((data["field"], error.message.removeprefix(f"{data['field']}: ")))
    _add_violations(status, violations)
    return Failure(status, known.http_code, JSON_RPC_ERROR_CODE_MAP.get(type(error), -32603))


def _of_runlane(error: RunlaneError) -> Failure:
    status = from_error(error)
    http = HTTP_CODES.get(status.code, 500)
    kind = next((kind for ours, kind in _KINDS if isinstance(error, ours)), None)
    if kind is None:
        return Failure(status, http, SERVER_ERROR)
    known = A2A_ERROR_MAPPING[kind]
    made = status_pb2.Status(code=code_pb2.Code.Value(known.grpc_status), message=status.message)
    _add(made, error_details_pb2.ErrorInfo(reason=known.reason, domain=DOMAIN))
    made.details.extend(_renamed(each) for each in status.details)
    return Failure(made, known.http_code, JSON_RPC_ERROR_CODE_MAP[kind])


def _of_refused(error: Refused) -> Failure:
    http = error.http or HTTP_CODES.get(error.status.code, 500)
    code = SERVER_ERROR
    made = status_pb2.Status()
    made.CopyFrom(error.status)
    if http == 415:
        code = _as(made, ContentTypeNotSupportedError)
    elif made.code == code_pb2.INVALID_ARGUMENT:
        code = _as(made, InvalidRequestError)
    return Failure(made, http, code)


def _as(status: status_pb2.Status, kind: type[A2AError]) -> int:
    """Puts the `ErrorInfo` of A2A first; returns the JSON-RPC code."""
    first = any_pb2.Any()
    first.Pack(error_details_pb2.ErrorInfo(reason=A2A_ERROR_MAPPING[kind].reason, domain=DOMAIN))
    rest = list(status.details)
    del status.details[:]
    status.details.extend([first, *rest])
    return JSON_RPC_ERROR_CODE_MAP[kind]


def _renamed(detail: any_pb2.Any) -> any_pb2.Any:
    """Names the fields as A2A does."""
    bad_request = error_details_pb2.BadRequest()
    if not detail.Unpack(bad_request):
        return detail
    for each in bad_request.field_violations:
        if each.field in _FIELDS:
            each.field = _FIELDS[each.field]
            continue
        first, *rest = each.field.replace("[", ".[").split(".")
        each.field = ".".join([_FIELDS.get(first, first), *rest]).replace(".[", "[")
    packed = any_pb2.Any()
    packed.Pack(bad_request)
    return packed


def _add(status: status_pb2.Status, detail: Message) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def _add_violations(status: status_pb2.Status, violations: list[tuple[str, str]]) -> None:
    if violations:
        found = [
            error_details_pb2.BadRequest.FieldViolation(field=field, description=problem)
            for field, problem in violations
        ]
        _add(status, error_details_pb2.BadRequest(field_violations=found))


def _detail(packed: any_pb2.Any) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json_format.MessageToJson(packed, indent=None))
    return made
