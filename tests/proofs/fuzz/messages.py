"""Invalid or barely valid messages over a valid connection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc import StatusCode

from proofs.fuzz.mutate import mutated
from proofs.fuzz.tries import Broken

DEADLINE = 0.3
"""Timeout in seconds; it ends a subscription or a wait that happened to be valid."""

_OURS = "runlane.v1."
_RUNS, _SESSIONS = "/runlane.v1.RunService/", "/runlane.v1.SessionService/"
_HEALTH, _REFLECTION = "/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/"

METHODS: Mapping[str, Sequence[bytes]] = {
    _RUNS + "RunAccepted": (
        b"\x0a\x01s\x1a\x02hi\x48\x01",
        b"\x0a\x01s\x1a\x02hi\x32\x02\x08\x05\x48\x01",
        b'\x0a\x01t\x1a\x0e[{"text": "a"}]\x48\x01',
    ),
    _RUNS + "UpdateRun": (b"\x0a\x01r\x12\x08\x0a\x06prompt\x1a\x02hi",),
    _RUNS + "Cancel": (b"\x0a\x01s", b"\x12\x01r"),
    _RUNS + "CancelAll": (b"", b"\x0a\x01x"),
    _RUNS + "SubscribeRunComplete": (b"", b"\x0a\x01s", b"\x1a\x04AAAA"),
    _RUNS + "SubscribeRun": (b"\x0a\x01r",),
    _RUNS + "WaitRun": (b"\x0a\x01r\x12\x02\x08\x01",),
    _RUNS + "GetRun": (b"\x0a\x01r",),
    _RUNS + "ListRuns": (b"\x0a\x01s", b"\x12\x01\x02\x18\x05", b"\x22\x04AAAA"),
    _RUNS + "ListInputRequests": (b"", b"\x0a\x01s", b"\x1a\x01\x01\x20\x05"),
    _RUNS + "AnswerInput": (b"\x0a\x01i\x12\x01x", b"\x0a\x01i\x12\x01x\x1a\x02hi"),
    _SESSIONS + "CreateSession": (b"\x0a\x01s\x12\x01t",),
    _SESSIONS + "GetSession": (b"\x0a\x01s",),
    _SESSIONS + "ListSessions": (b"\x08\x05",),
    _SESSIONS + "DeleteSession": (b"\x0a\x01s",),
    _SESSIONS + "ListMessages": (b"\x0a\x01s\x10\x05",),
    _SESSIONS + "SubscribeSession": (b"\x0a\x01s\x18\x01", b"\x0a\x01s\x12\x04AAAA", b""),
    _HEALTH + "Check": (b"", b"\x0a\x01x"),
    _HEALTH + "Watch": (b"", b"\x0a\x01x"),
    _REFLECTION + "ServerReflectionInfo": (b"\x3a\x00", b"\x22\x01x", b"\x1a\x01x"),
    _RUNS + "NoSuchMethod": (b"",),
}

SHAPES: Sequence[bytes] = (
    b"\xff" * 40,
    b"\x0a\xff\xff\xff\xff\x0f",
    b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x0a\x02\xc3\x28",
    b"\x1a\x03\xed\xa0\x80",
    b"\x08\x01\x10\x01\x18\x01",
    b"\x0d\0\0\0\0\x15\0\0\0\0",
    b"\x0b" * 5000,
    b"\x9b\x06" * 200 + b"\x9c\x06" * 200,
    b"\x00\x01",
    b"\x07",
    b"\x0c",
    b"\xfa\xff\xff\xff\x0f\x01x" * 100,
    b"\x32\x0b\x08\xff\xff\xff\xff\xff\xff\xff\xff\x7f\x10\x01",
)
"""Known defects: lengths, UTF-8, wire types, groups, field 0, invalid times."""

GRPC_OWN = {
    StatusCode.UNIMPLEMENTED: "a method that is not there",
    StatusCode.RESOURCE_EXHAUSTED: "a message, or metadata, that is too large",
}
"""Statuses that gRPC itself returns, without ErrorInfo."""

Sent: TypeAlias = tuple[str, bytes, Sequence[tuple[str, str | bytes]]]
"""A method, a message, and metadata."""

_LEFT = (StatusCode.DEADLINE_EXCEEDED, StatusCode.CANCELLED)


def some(random: Random) -> Sent:
    """A random method, message and metadata; now and then one of them is too large."""
    method = random.choice(list(METHODS))
    seeds = METHODS[method]
    match random.randrange(10):
        case 0:
            message = random.randbytes(random.randint(0, 200))
        case 1 | 2:
            message = random.choice(SHAPES)
        case 3 if random.random() < 0.1:
            message = bytes((4 << 20) + 1)
        case _:
            message = mutated(random, random.choice(seeds), seeds)
    metadata: list[tuple[str, str | bytes]] = []
    if random.random() < 0.1:
        metadata.append(("x-bin", random.randbytes(random.choice((0, 10, 3000, 20_000)))))
    if random.random() < 0.1:
        metadata.append(("authorization", "Bearer " + "x" * random.choice((0, 60, 9000))))
    if random.random() < 0.1:
        metadata.append(("traceparent", "00-" + "z" * 32 + "-00"))
    return method, message, metadata


def send(
    channel: grpc.Channel, method: str, message: bytes, metadata: Sequence[tuple[str, str | bytes]]
) -> StatusCode:
    """Sends a message and returns the status. Raises Broken for an unexpected status."""
    # Without serializers the bytes are sent unchanged; the type stubs do not allow that.
    behavior: Any = channel.stream_stream(method)
    call = behavior(iter([message]), timeout=DEADLINE, metadata=tuple(metadata))
    try:
        for _ in call:
            pass
    except grpc.RpcError:
        pass
    code: StatusCode = call.code()
    if code is StatusCode.OK or code in _LEFT:
        return code
    if code in (StatusCode.UNKNOWN, StatusCode.INTERNAL):
        raise Broken(f"{method} ended with {code.name}: {call.details()}")
    if _OURS in method and code not in GRPC_OWN and not _has_details(call.trailing_metadata()):
        raise Broken(f"{method} ended with {code.name} without ErrorInfo: {call.details()}")
    return code


def _has_details(trailing: Sequence[tuple[str, str | bytes]] | None) -> bool:
    data = dict(trailing or ()).get("grpc-status-details-bin", b"")
    info = error_details_pb2.ErrorInfo()
    try:
        status = status_pb2.Status.FromString(data)
        return any(one.Unpack(info) and info.domain == "runlane" for one in status.details)
    except DecodeError:
        return False
