"""Reads what a gRPC error says, and makes the most specific of our errors of it."""

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

from runlane.errors import BY_REASON, BY_STATUS, RunlaneError, UnexpectedStatus, Violation

DOMAIN = "runlane"
"""The domain of our ErrorInfo; those of others are not ours to read."""

STATUS_DETAILS = "grpc-status-details-bin"
"""The trailing metadata that holds a `google.rpc.Status`."""


def from_rpc(error: grpc.aio.AioRpcError, peer: str = "") -> RunlaneError:
    """The most specific of our errors for one of gRPC's; `peer` names whom the call went to."""
    details = _Details.of(error)
    status = error.code()
    if details.reason:
        return _by_server(status, error.details() or "", details)
    message = _told(status, error.details() or "", peer)
    cls = BY_STATUS.get(status, UnexpectedStatus)
    # Without ErrorInfo nobody gave a reason, whatever the class is called.
    return cls(
        message,
        status=status,
        reason="",
        violations=details.violations,
        retry_after=details.retry_after,
    )


def _by_server(status: StatusCode, message: str, details: _Details) -> RunlaneError:
    cls = BY_REASON.get(details.reason) or BY_STATUS.get(status, UnexpectedStatus)
    return cls(
        message or details.reason,
        status=status,
        reason=details.reason,
        violations=details.violations,
        retry_after=details.retry_after,
        metadata=details.metadata,
    )


def _told(status: StatusCode, text: str, peer: str) -> str:
    """A sentence for an error about which no Runlane server said anything."""
    at = peer or "the server"
    if status is StatusCode.UNAVAILABLE:
        return f"cannot reach {at}: {text}" if text else f"cannot reach {at}"
    if status is StatusCode.DEADLINE_EXCEEDED:
        return f"{at} did not answer in time"
    if status is StatusCode.UNIMPLEMENTED:
        return f"{at} does not speak runlane.v1, or an older one: {text}"
    return f"{at} answered {status.name}: {text}" if text else f"{at} answered {status.name}"


@dataclass(slots=True)
class _Details:
    """What a `google.rpc.Status` holds for us."""

    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)
    retry_after: timedelta | None = None

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError) -> _Details:
        details = cls()
        for status in _statuses(error):
            # Whoever answered may not be a Runlane server: what is no detail of its type, or no
            # length of time, is left out.
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
                Violation(found.field, found.description) for found in request.field_violations
            )
        elif detail.Unpack(quota):
            self.violations += (
                Violation(found.subject, found.description) for found in quota.violations
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
            # Somebody else's metadata of the same name: the status itself still counts.
            continue
