"""The one table of errors: complete, as documented, and small enough to be sent."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from runlane.v1 import error_reason_pb2
from runlane_server.core import errors
from runlane_server.rpc.errors import DOMAIN, STATUS, internal_error, wire_error

PROTO = Path(__file__).parents[2] / "proto/runlane/v1/error_reason.proto"

PREFIX = "ERROR_REASON_"


def kinds(
    of: type[errors.RunlaneError] = errors.RunlaneError,
) -> Iterator[type[errors.RunlaneError]]:
    for kind in of.__subclasses__():
        yield kind
        yield from kinds(kind)


def test_the_table_has_every_reason_of_the_interface() -> None:
    names = error_reason_pb2.ErrorReason.DESCRIPTOR.values_by_name
    published = {name.removeprefix(PREFIX) for name in names}
    assert set(STATUS) == published - {"UNSPECIFIED"}


def test_the_table_matches_the_documented_statuses() -> None:
    documented = re.findall(
        rf"// ([A-Z_]+): (?:[^\n]|\n *//)*\n *{PREFIX}([A-Z_]+) = ", PROTO.read_text()
    )
    assert {reason: status for status, reason in documented} == {
        reason: status.name for reason, status in STATUS.items()
    }


def test_every_error_has_its_status() -> None:
    # A class without a reason of its own is a finer distinction within the server.
    reasons = [kind.reason for kind in kinds() if "reason" in vars(kind)]
    assert set(reasons) <= set(STATUS)
    assert len(set(reasons)) == len(reasons)


@pytest.mark.parametrize("kind", list(kinds()), ids=lambda kind: kind.__name__)
def test_an_error_carries_its_reason_status_and_metadata(kind: type[errors.RunlaneError]) -> None:
    encoded = wire_error(kind("it went wrong", metadata={"cursor": "c"}))
    status = status_pb2.Status.FromString(encoded.details)
    (detail,) = status.details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    assert (info.domain, info.reason, dict(info.metadata)) == (DOMAIN, kind.reason, {"cursor": "c"})
    assert encoded.code is STATUS[kind.reason]
    assert (status.code, status.message) == (encoded.code.value[0], encoded.message)
    assert encoded.message == "it went wrong"


def test_a_retry_delay_is_sent() -> None:
    encoded = wire_error(errors.Overloaded("full", retry_after=1.25))
    retry = error_details_pb2.RetryInfo()
    assert status_pb2.Status.FromString(encoded.details).details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1250


@pytest.mark.parametrize("text", ["x", "ä", "日"])
def test_an_error_fits_into_a_header(text: str) -> None:
    wrong = [errors.Violation(f"metadata[{n}]" + text * 300, text * 1000) for n in range(1000)]
    encoded = wire_error(errors.InvalidArgument(text * 100_000, violations=wrong))
    # Headers are percent-encoded or base64: at worst 3 and 4/3 times as long.
    assert len(encoded.message.encode()) * 3 + len(encoded.details) * 4 / 3 < 8 * 1024
    bad = error_details_pb2.BadRequest()
    assert status_pb2.Status.FromString(encoded.details).details[1].Unpack(bad)
    assert bad.field_violations[0].field.startswith("metadata[0]")


def test_an_unexpected_error_reveals_only_its_id() -> None:
    encoded, error_id = internal_error()
    other, other_id = internal_error()
    assert encoded.code is grpc.StatusCode.INTERNAL
    assert error_id != other_id
    assert error_id in encoded.message
    assert encoded.details != other.details
