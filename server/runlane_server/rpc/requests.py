"""Reads the requests of admitted calls, within limits of their size and number.

gRPC takes in a whole message before it calls the handler of a unary method. Handlers are therefore
registered as streaming methods: the caller is authenticated by the metadata of its call, and only
then is its message read. Until then gRPC holds at most `WINDOW` bytes of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from runlane.v1.run_service_pb2 import SubscribeRunCompleteRequest
from runlane.v1.session_service_pb2 import SubscribeSessionRequest
from runlane_server.access.control import OpenCall
from runlane_server.access.permissions import PUBLIC_METHODS
from runlane_server.core.errors import InvalidArgument, Overloaded, RunlaneError

WINDOW = 64 << 10
"""Bytes of a message that gRPC takes in before the message is read."""

MAX_MESSAGE = 4 << 20
"""Maximum size in bytes of any request; gRPC refuses a larger one."""

MAX_FIELDS = 4096
"""Maximum number of fields in a request, each element of a list included. The largest valid request
has two lists of 1,000 ids."""

SLOTS = 64
"""Requests that are read at once for each tenant; together they take at most 256 MiB."""

PATIENCE = 5.0
"""Seconds that a request may take while others of its tenant wait to be read."""

PUBLIC_PATIENCE = 0.0
"""The same for methods without authentication. Their requests arrive in one piece, so only one that
was sent in part is ever overtaken."""

MIN_WAIT = 0.05
"""Seconds between two looks at the oldest request."""

_RUNS = "/runlane.v1.RunService/"
_SESSIONS = "/runlane.v1.SessionService/"
_AGENTS = "/runlane.v1.AgentService/"
_WEBHOOKS = "/runlane.v1.WebhookService/"
_HARNESS = "/runlane.harness.v1.HarnessService/"
_WORKER = "/runlane.worker.v1.WorkerService/"
_HEALTH = "/grpc.health.v1.Health/"

REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

_IDS = 8 << 10
"""Bytes: a few ids of up to 128 characters, a reason, a page token."""

MAX_BYTES: Mapping[str, int] = MappingProxyType(
    {
        _RUNS + "RunAccepted": MAX_MESSAGE,
        _RUNS + "UpdateRun": MAX_MESSAGE,
        _RUNS + "Cancel": _IDS,
        _RUNS + "CancelAll": _IDS,
        # 2,000 ids.
        _RUNS + "SubscribeRunComplete": 512 << 10,
        _RUNS + "SubscribeRun": _IDS,
        _RUNS + "WaitRun": _IDS,
        _RUNS + "GetRun": _IDS,
        _RUNS + "ListRuns": 64 << 10,
        _RUNS + "ListInputRequests": _IDS,
        # An answer of up to 64 KiB, which as text may have six bytes for one character.
        _RUNS + "AnswerInput": 512 << 10,
        # 64 labels of up to 4 KiB.
        _SESSIONS + "CreateSession": 512 << 10,
        _SESSIONS + "UpdateSession": 512 << 10,
        _SESSIONS + "ForkSession": _IDS,
        _SESSIONS + "GetSession": _IDS,
        _SESSIONS + "DeleteSession": _IDS,
        # 8 labels of up to 4 KiB, to filter by.
        _SESSIONS + "ListSessions": 64 << 10,
        _SESSIONS + "ListMessages": _IDS,
        # 1,000 ids with their cursors.
        _SESSIONS + "SubscribeSession": 512 << 10,
        _AGENTS + "ListAgents": _IDS,
        # A filter of up to 120 ids and labels.
        _WEBHOOKS + "CreateWebhook": 64 << 10,
        _WEBHOOKS + "UpdateWebhook": 64 << 10,
        **{
            _WEBHOOKS + name: _IDS
            for name in (
                "GetWebhook",
                "ListWebhooks",
                "DeleteWebhook",
                "RedeliverWebhook",
                "RotateWebhookSecret",
            )
        },
        # The arguments of a tool call and a result, of 1 MiB each.
        _WORKER + "Work": (2 << 20) + (64 << 10),
        **{
            _HARNESS + name: _IDS
            for name in (
                "GetServer",
                "ArmGate",
                "AwaitGate",
                "ReleaseGate",
                "ListGates",
                "AdvanceClock",
                "Crash",
                "Drain",
            )
        },
        **{_HEALTH + name: _IDS for name in ("Check", "List", "Watch")},
        REFLECTION: _IDS,
    }
)
"""Maximum size of a request of each method, in bytes."""


class RefusedRequest:
    """Stands in for a request that cannot be served, so that the call gets an answer.

    gRPC answers UNKNOWN if a deserializer raises.
    """

    def __init__(self, error: RunlaneError) -> None:
        self.error = error


def malformed() -> InvalidArgument:
    """The error for a request that is not a message of its type."""
    # The parser of protobuf refuses strings that are not UTF-8 without naming the field.
    return InvalidArgument.of(
        "request", "is not a valid message of its type, or a string in it is not UTF-8"
    )


def bounded(deserialize: Callable[[bytes], Any], method: str) -> Callable[[bytes], Any]:
    """Returns a deserializer that parses nothing too large for its method, and never raises."""
    limit = MAX_BYTES.get(method, MAX_MESSAGE)

    def decode(data: bytes) -> Any:
        size = len(data)
        if size > limit:
            problem = f"has {size} bytes; the limit of this method is {limit}"
            return RefusedRequest(InvalidArgument.of("request", problem))
        # A parsed field takes up to a hundred times its size on the wire.
        if size > MAX_FIELDS and has_more_fields(data, MAX_FIELDS):
            problem = f"has more than {MAX_FIELDS} fields and list elements"
            return RefusedRequest(InvalidArgument.of("request", problem))
        try:
            return deserialize(data)
        except DecodeError:
            return RefusedRequest(malformed())

    return decode


def has_more_fields(data: bytes, most: int) -> bool:
    """Whether a message has more than `most` fields; False if it is malformed.

    Walks the outermost message only: no request has a list inside of an element of a list.
    """
    at = count = 0
    try:
        while at < len(data):
            count += 1
            if count > most:
                return True
            tag, at = _varint(data, at)
            match tag & 7:
                case 0:
                    _, at = _varint(data, at)
                case 1:
                    at += 8
                case 2:
                    size, at = _varint(data, at)
                    at += size
                case 5:
                    at += 4
                case 3 | 4:
                    pass  # the begin or the end of a group, whose fields are counted as well
                case _:
                    return False
    except IndexError:
        return False
    return False


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Returns a number of up to 10 bytes and the place after it. Raises IndexError."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError


def number_of_ids(request: object) -> int:
    """The ids in a request that the server keeps as long as the call is open."""
    if isinstance(request, SubscribeRunCompleteRequest):
        return len(request.session_ids) + len(request.run_ids)
    if isinstance(request, SubscribeSessionRequest):
        return len(request.session_ids)
    return 0


class RequestReader:
    """Reads requests, `SLOTS` at a time for each tenant.

    A request that keeps others waiting for longer than its patience loses its place, so callers who
    send half a message cannot block anyone.
    """

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}

    async def read(self, context: Any, call: OpenCall) -> Any:
        """Returns the request of a call. Raises InvalidArgument, or Overloaded for a slow one."""
        name = call.caller.tenant
        line = self._lines.get(name)
        if line is None:
            patience = PUBLIC_PATIENCE if call.method in PUBLIC_METHODS else PATIENCE
            line = self._lines[name] = _Line(patience)
        line.users += 1
        try:
            request = await line.read(context.read, call)
        finally:
            line.users -= 1
            if not line.users:
                del self._lines[name]
        if request is grpc.aio.EOF:
            raise InvalidArgument.of("request", "is missing")
        if isinstance(request, RefusedRequest):
            raise request.error
        return request


class _Line:
    """The requests of one tenant that are being read, oldest first, and those that wait."""

    def __init__(self, patience: float) -> None:
        self.users = 0
        self._patience = patience
        self._slots = asyncio.Semaphore(SLOTS)
        self._reading: dict[OpenCall, float] = {}

    async def read(self, read: Callable[[], Awaitable[Any]], call: OpenCall) -> Any:
        if self._slots.locked():
            await self._wait_for_slot()
        else:
            await self._slots.acquire()
        self._reading[call] = asyncio.get_running_loop().time()
        try:
            return await read()
        finally:
            self._free(call)

    async def _wait_for_slot(self) -> None:
        while True:
            left = self._patience
            oldest = next(iter(self._reading), None)
            if oldest is not None:
                now = asyncio.get_running_loop().time()
                left += self._reading[oldest] - now
                if left <= 0:
                    self._free(oldest)
                    oldest.revoke(Overloaded("the request arrived too slowly", retry_after=1.0))
            try:
                async with asyncio.timeout(max(left, MIN_WAIT)):
                    await self._slots.acquire()
                    return
            except TimeoutError:
                continue

    def _free(self, call: OpenCall) -> None:
        """Frees the slot of a call, unless it has lost it before."""
        if self._reading.pop(call, None) is not None:
            self._slots.release()
