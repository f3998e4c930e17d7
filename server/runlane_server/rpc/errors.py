"""Errors on the wire: the one table of reasons, and their encoding as a gRPC status.

The client reverses the table; `proto/runlane/v1/error_reason.proto` documents it.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc import StatusCode

from runlane_server.core.errors import QuotaExceeded, RunlaneError, Violation
from runlane_server.core.model import cut_utf8

DOMAIN = "runlane"

STATUS: Mapping[str, StatusCode] = MappingProxyType(
    {
        "EMPTY_PROMPT": StatusCode.INVALID_ARGUMENT,
        "SESSION_MISSING": StatusCode.INVALID_ARGUMENT,
        "SESSION_NOT_FOUND": StatusCode.NOT_FOUND,
        "SESSION_EXISTS": StatusCode.ALREADY_EXISTS,
        "ACTIVE_RUN_CHANGED": StatusCode.FAILED_PRECONDITION,
        "ALREADY_STARTED": StatusCode.FAILED_PRECONDITION,
        "ANCHOR_NOT_WAITING": StatusCode.FAILED_PRECONDITION,
        "EDIT_CONFLICT": StatusCode.FAILED_PRECONDITION,
        "TURN_NOT_FOUND": StatusCode.NOT_FOUND,
        "TURN_NOT_FINISHED": StatusCode.FAILED_PRECONDITION,
        "SESSION_BUSY": StatusCode.FAILED_PRECONDITION,
        "SESSION_BEING_DELETED": StatusCode.UNAVAILABLE,
        "RUN_MISSING": StatusCode.INVALID_ARGUMENT,
        "RUN_NOT_FOUND": StatusCode.NOT_FOUND,
        "RUN_ID_CONFLICT": StatusCode.ALREADY_EXISTS,
        "RUN_DELETED": StatusCode.FAILED_PRECONDITION,
        "AGENT_NOT_FOUND": StatusCode.NOT_FOUND,
        "WEBHOOK_NOT_FOUND": StatusCode.NOT_FOUND,
        "WEBHOOK_CHANGED": StatusCode.ABORTED,
        "QUEUE_FULL": StatusCode.RESOURCE_EXHAUSTED,
        "OVERLOADED": StatusCode.RESOURCE_EXHAUSTED,
        "QUOTA_EXCEEDED": StatusCode.RESOURCE_EXHAUSTED,
        "INPUT_NOT_FOUND": StatusCode.NOT_FOUND,
        "INPUT_CLOSED": StatusCode.FAILED_PRECONDITION,
        "ANSWER_INVALID": StatusCode.INVALID_ARGUMENT,
        "PROMPT_TOO_LARGE": StatusCode.INVALID_ARGUMENT,
        "CURSOR_INVALID": StatusCode.INVALID_ARGUMENT,
        "CURSOR_COMPACTED": StatusCode.OUT_OF_RANGE,
        "PAGE_TOKEN_INVALID": StatusCode.INVALID_ARGUMENT,
        "INVALID_ARGUMENT": StatusCode.INVALID_ARGUMENT,
        "DRAINING": StatusCode.UNAVAILABLE,
        "STORE_UNAVAILABLE": StatusCode.UNAVAILABLE,
        "CORRUPT_RECORD": StatusCode.DATA_LOSS,
        "UNAUTHENTICATED": StatusCode.UNAUTHENTICATED,
        "PERMISSION_DENIED": StatusCode.PERMISSION_DENIED,
        "INTERNAL": StatusCode.INTERNAL,
        "GATE_NOT_FOUND": StatusCode.NOT_FOUND,
        "UNSUPPORTED": StatusCode.UNIMPLEMENTED,
    }
)
"""The gRPC status of each reason."""

DETAILS_KEY = "grpc-status-details-bin"

# A peer refuses headers above 8 KiB (grpc.max_metadata_size), and the message is sent twice.
_MESSAGE_BYTES = 512
_VIOLATIONS_BYTES = 3072


@dataclass(frozen=True, slots=True)
class WireError:
    """An error as `context.abort` takes it."""

    code: StatusCode
    message: str
    details: bytes

    @property
    def trailing_metadata(self) -> tuple[tuple[str, bytes]]:
        """The trailing metadata with the encoded details."""
        return ((DETAILS_KEY, self.details),)


def wire_error(error: RunlaneError) -> WireError:
    """Encodes an error."""
    message, _ = cut_utf8(error.message, _MESSAGE_BYTES)
    return _wire_error(STATUS[error.reason], error.reason, message, error.metadata, _details(error))


def internal_error(code: StatusCode = StatusCode.INTERNAL) -> tuple[WireError, str]:
    """The error for an unexpected exception, and the id that identifies it in the log."""
    error_id = secrets.token_hex(8)
    message = f"internal error {error_id}; see the log of the server for details"
    return _wire_error(code, "INTERNAL", message, {"error_id": error_id}, ()), error_id


def _wire_error(
    code: StatusCode,
    reason: str,
    message: str,
    metadata: Mapping[str, str],
    extras: Iterable[Message],
) -> WireError:
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)
    number, _ = code.value
    status = status_pb2.Status(
        code=number, message=message, details=[_any(detail) for detail in (info, *extras)]
    )
    return WireError(code, message, status.SerializeToString())


def _details(error: RunlaneError) -> Iterator[Message]:
    if error.violations and isinstance(error, QuotaExceeded):
        yield error_details_pb2.QuotaFailure(violations=_quota_violations(error.violations))
    elif error.violations:
        yield error_details_pb2.BadRequest(field_violations=_violations(error.violations))
    if error.retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after * 1e9))
        yield error_details_pb2.RetryInfo(retry_delay=delay)


def _violations(violations: Iterable[Violation]) -> Iterator[Message]:
    """Encodes as many violations as fit into a header."""
    room = _VIOLATIONS_BYTES
    for violation in violations:
        field, _ = cut_utf8(violation.field, _MESSAGE_BYTES)
        description, _ = cut_utf8(violation.description, _MESSAGE_BYTES)
        wire = error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
        room -= wire.ByteSize()
        if room < 0:
            return
        yield wire


def _quota_violations(violations: Iterable[Violation]) -> Iterator[Message]:
    """Encodes exhausted quotas; an error names one, so they fit into a header."""
    for violation in violations:
        subject, _ = cut_utf8(violation.field, _MESSAGE_BYTES)
        description, _ = cut_utf8(violation.description, _MESSAGE_BYTES)
        yield error_details_pb2.QuotaFailure.Violation(subject=subject, description=description)


def _any(detail: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed
