"""Converts gRPC errors to the most specific class of `runlane.errors`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta

import grpc.aio
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc import StatusCode

from runlane.errors import (
    BY_REASON,
    BY_STATUS,
    NotConnected,
    RunlaneError,
    UnexpectedStatus,
    Violation,
)

DOMAIN = "runlane"
"""The domain of Runlane's ErrorInfo; ErrorInfo of other domains is ignored."""

STATUS_DETAILS = "grpc-status-details-bin"
"""The key of the trailing metadata that contains a `google.rpc.Status`."""


_NOT_CONNECTED = (
    "failed to connect to all addresses",
    "errors resolving ",
    "DNS resolution failed",
)
"""Texts of gRPC's core for a call that had no connection. A call with another text may have been
sent."""


def from_rpc(error: grpc.aio.AioRpcError, target: str = "") -> RunlaneError:
    """Converts a gRPC error; `target` names the server in the message."""
    details = _Details.of(error)
    status = error.code()
    if details.reason:
        return _from_details(status, error.details() or "", details)
    text = error.details() or ""
    message = _message_without_details(status, text, target)
    cls = BY_STATUS.get(status, UnexpectedStatus)
    if status is StatusCode.UNAVAILABLE and text.startswith(_NOT_CONNECTED):
        cls, message = NotConnected, f"{message}; is a server running there?"
    # The server sent no ErrorInfo, so the class's own reason does not apply.
    return cls(
        message,
        status=status,
        reason="",
        violations=details.violations,
        retry_after=details.retry_after,
    )


def _from_details(status: StatusCode, message: str, details: _Details) -> RunlaneError:
    cls = BY_REASON.get(details.reason) or BY_STATUS.get(status, UnexpectedStatus)
    return cls(
        message or details.reason,
        status=status,
        reason=details.reason,
        violations=details.violations,
        retry_after=details.retry_after,
        metadata=details.metadata,
    )


def _message_without_details(status: StatusCode, text: str, target: str) -> str:
    """Returns a message for an error that has no ErrorInfo of a Runlane server."""
    server = target or "the server"
    if status is StatusCode.UNAVAILABLE:
        return f"cannot reach {server}: {text}" if text else f"cannot reach {server}"
    if status is StatusCode.DEADLINE_EXCEEDED:
        return f"{server} did not answer in time"
    if status is StatusCode.UNIMPLEMENTED:
        return f"{server} does not implement this call of runlane.v1: {text}"
    message = f"{server} returned {status.name}"
    return f"{message}: {text}" if text else message


@dataclass(slots=True)
class _Details:
    """The details of a `google.rpc.Status` that the client uses."""

    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)
    retry_after: timedelta | None = None

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError) -> _Details:
        details = cls()
        for status in _statuses(error):
            # The sender may not be a Runlane server: skip details that cannot be decoded, or whose
            # duration is out of range.
            for detail in status.details:
                with suppress(DecodeError, OverflowError, ValueError):
                    details._add(detail)
        return details

    def _add(self, detail: any_pb2.Any) -> None:
        info = error_details_pb2.ErrorInfo()
        request = error_details_pb2.BadRequest()
        quota = error_details_pb2.QuotaFailure()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            if info.domain == DOMAIN:
                self.reason = info.reason
                self.metadata.update(info.metadata)
        elif detail.Unpack(request):
            self.violations += (
                Violation(each.field, each.description) for each in request.field_violations
            )
        elif detail.Unpack(quota):
            self.violations += (
                Violation(each.subject, each.description) for each in quota.violations
            )
        elif detail.Unpack(retry):
            self.retry_after = retry.retry_delay.ToTimedelta()


def _statuses(error: grpc.aio.AioRpcError) -> Iterator[status_pb2.Status]:
    for key, value in error.trailing_metadata() or ():
        if key != STATUS_DETAILS or not isinstance(value, bytes):
            continue
        try:
            yield status_pb2.Status.FromString(value)
        except DecodeError:
            # Not a `google.rpc.Status`: the gRPC status itself is still valid.
            continue
