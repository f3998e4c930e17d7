"""gRPC, on a port of its own: the facade is a client of the server, in a process of its own.

gRPC takes in a whole message before it calls the handler of a unary method. Handlers are therefore
registered as streaming methods: the caller is authenticated by the metadata of its call, and only
then is its message read. Until then gRPC holds at most `WINDOW` bytes of it.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias, cast

import grpc
import grpc.aio
from a2a.server.request_handlers.request_handler import RequestHandler
from a2a.utils.errors import InvalidRequestError
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2  # type: ignore[import-untyped]

from runlane_a2a.errors import refuse, to_failure
from runlane_a2a.operations import OPERATIONS, Operation, check_version
from runlane_a2a.settings import Caller, context_for
from runlane_server.rpc.grpc_server import make_server
from runlane_web.decode import MAX_ELEMENTS
from runlane_web.errors import Refused

log = logging.getLogger("runlane_a2a")

SERVICE = "lf.a2a.v1.A2AService"

MAX_MESSAGE = 4 << 20
"""Maximum size in bytes of a request."""

WINDOW = 64 << 10
"""Bytes of a message that gRPC takes in before the message is read."""

MAX_CALLS = 4_096
"""Maximum number of calls in flight of a connection."""

MAX_CONNECTIONS = 10_000
"""Maximum number of connections, where the process may open twice as many files."""

MAX_METADATA = 16 << 10
"""Bytes of metadata of a call."""

SLOTS = 16
"""Messages that are read at once for each token; together they take at most 64 MiB."""

MESSAGE_TIMEOUT = 10.0
"""Seconds within which the message of a call must have arrived."""

CHECK_SECONDS = 1.0
"""Seconds between two looks whether gRPC's server still runs."""

GRACE = 5.0
"""Seconds that open calls get when the gateway stops."""

_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", MAX_CALLS),
    # Both limits are equal: between them, gRPC refuses calls at random.
    ("grpc.max_metadata_size", MAX_METADATA),
    ("grpc.absolute_max_metadata_size", MAX_METADATA),
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    # The window of a stream stays small until its message is read, and is not widened by estimates.
    ("grpc.http2.lookahead_bytes", WINDOW),
    ("grpc.http2.bdp_probe", 0),
    # Silent connections are closed, those without a call, and those whose peer is lost.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 60_000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.min_time_between_pings_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)

Enter: TypeAlias = Callable[[str | None, str], AbstractAsyncContextManager[Caller]]


class GrpcTransport:
    """Serves A2A over gRPC.

    Args:
        handler: The operations.
        enter: Returns a context with the caller, for the metadata `authorization` and
            `idempotency-key`, once the server has accepted it. Raises Refused, RunlaneError.
    """

    def __init__(self, handler: RequestHandler, enter: Enter) -> None:
        self._handler = handler
        self._enter = enter
        self._messages = _Messages()
        self._server: grpc.aio.Server | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._broken: set[asyncio.Task[None]] = set()

    async def start(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        """Listens at an address; returns the port. Raises RuntimeError if it is taken."""
        host = address.rpartition(":")[0]
        server = self._new_server()
        port = await _serve(server, address, credentials)
        self._server = server
        self._keeping = asyncio.create_task(self._keep_serving(f"{host}:{port}", credentials))
        return port

    async def _keep_serving(
        self, address: str, credentials: grpc.ServerCredentials | None
    ) -> NoReturn:
        """Starts gRPC's server again whenever it has broken down: its main loop ends after any
        unexpected error, and HTTP, in the same process, would not notice."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            server = self._server
            if server is None or _is_running(server):
                continue
            log.error("the gRPC server of A2A broke down; restarting it")
            self._server = None
            # Open calls have a while to end; the address is free at once.
            stopping = asyncio.create_task(server.stop(GRACE))
            self._broken.add(stopping)
            stopping.add_done_callback(self._broken.discard)
            # One server for all tries: gRPC leaks one that was never started.
            server = self._new_server()
            while self._server is None:
                try:
                    await _serve(server, address, credentials)
                    self._server = server
                except RuntimeError as error:
                    log.warning("the gRPC server of A2A cannot listen yet: %s", error)
                    await asyncio.sleep(CHECK_SECONDS)

    def _new_server(self) -> grpc.aio.Server:
        # Also safe against paths that are not UTF-8, which end a plain server of grpc.aio.
        server = make_server((*_OPTIONS, ("grpc.max_allowed_incoming_connections", _connections())))
        handlers = {each.name: self._method(each) for each in OPERATIONS}
        server.add_registered_method_handlers(SERVICE, handlers)
        return server

    async def stop(self) -> None:
        """Ends the calls, and stops to listen."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
        if self._server is not None:
            await self._server.stop(GRACE)

    def _method(self, operation: Operation) -> grpc.RpcMethodHandler[Any, Any]:
        async def unary(_: Any, context: Any) -> Message:
            try:
                async with self._caller(context) as caller:
                    message = await self._message(operation, context)
                    return await operation.call(self._handler, message, context_for(caller))
            except Exception as error:  # noqa: BLE001 - it becomes the status
                await _abort(context, error)

        async def stream(_: Any, context: Any) -> None:
            try:
                async with self._caller(context) as caller:
                    message = await self._message(operation, context)
                    events = operation.stream(self._handler, message, context_for(caller))
                    async with aclosing(events):
                        async for event in events:
                            await context.write(event)
            except grpc.aio.InternalError:
                raise  # the caller left during a write
            except Exception as error:  # noqa: BLE001 - it becomes the status
                await _abort(context, error)

        if operation.streams:
            return grpc.stream_stream_rpc_method_handler(stream, response_serializer=_serialize)
        return grpc.stream_unary_rpc_method_handler(unary, response_serializer=_serialize)

    def _caller(self, context: Any) -> AbstractAsyncContextManager[Caller]:
        return self._enter(
            _metadata(context, "authorization"), _metadata(context, "idempotency-key") or ""
        )

    async def _message(self, operation: Operation, context: Any) -> Message:
        """Reads the message of a known caller. Raises A2AError, Refused."""
        check_version(_metadata(context, "a2a-version") or "")
        token = _metadata(context, "authorization") or ""
        return _parse(operation, await self._messages.read(context, token))


@dataclass(slots=True)
class _Line:
    """The calls of one token whose messages are being read, and those that wait."""

    users: int = 0
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(SLOTS))


class _Messages:
    """Reads messages, `SLOTS` at a time for each token."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}

    async def read(self, context: Any, token: str) -> bytes:
        """Returns the message of a call. Raises A2AError, Refused."""
        try:
            async with asyncio.timeout(MESSAGE_TIMEOUT), self._slot(token):
                request = await context.read()
        except TimeoutError:
            raise _too_slow() from None
        if request is grpc.aio.EOF:
            raise refuse(InvalidRequestError, "is missing", field="request")
        message: bytes = request
        return message

    @asynccontextmanager
    async def _slot(self, token: str) -> AsyncIterator[None]:
        line = self._lines.setdefault(token, _Line())
        line.users += 1
        try:
            async with line.slots:
                yield
        finally:
            line.users -= 1
            if not line.users:
                del self._lines[token]


async def _serve(
    server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None
) -> int:
    """Starts a server; returns its port. Raises RuntimeError, and may be tried again."""
    if credentials is None:
        port = server.add_insecure_port(address)
    else:
        port = server.add_secure_port(address, credentials)
    await server.start()
    return port


def _is_running(server: grpc.aio.Server) -> bool:
    # The public wait_for_termination does not return when its main loop has ended.
    return bool(server._server.is_running())  # type: ignore[attr-defined] # noqa: SLF001


def _too_slow() -> Refused:
    message = f"request: did not arrive within {MESSAGE_TIMEOUT:g} s"
    return Refused(code_pb2.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", message, field="request")


def _connections() -> int:
    """The rest of the files of this process is for HTTP, the server and its own use."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if files < 0 else max(1, min(MAX_CONNECTIONS, files // 4))


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _parse(operation: Operation, request: bytes) -> Message:
    """Parses a request, once the caller is known. Raises A2AError."""
    message = operation.request()
    try:
        message.ParseFromString(request)
    except DecodeError:
        raise refuse(InvalidRequestError, "is not a message of A2A", field="request") from None
    if has_more_elements(message, MAX_ELEMENTS):
        # To check 4 MiB of small parts would hold up all other calls for half a minute.
        problem = f"has more than {MAX_ELEMENTS} fields and list elements"
        raise refuse(InvalidRequestError, problem, field="request")
    return message


def has_more_elements(message: Message, most: int) -> bool:
    """Returns True if a message has more than `most` fields and elements, at any depth."""
    count, left = 0, [message]
    while left and count <= most:
        for field_, value in left.pop().ListFields():
            count += len(value) if field_.is_repeated else 1
            if count > most:
                break
            left += _messages(field_, value)
    return count > most


def _messages(field_: FieldDescriptor, value: Any) -> Iterable[Message]:
    """The messages in the value of a field."""
    kind = field_.message_type
    if kind is None:
        return ()
    if not field_.is_repeated:
        return (value,)
    if not kind.GetOptions().map_entry:
        return cast("Iterable[Message]", value)
    return value.values() if kind.fields_by_name["value"].message_type is not None else ()


def _metadata(context: Any, name: str) -> str | None:
    """The value of a key; None if there is none, or more than one."""
    found = [value for key, value in context.invocation_metadata() or () if key == name]
    return found[0] if len(found) == 1 and isinstance(found[0], str) else None


async def _abort(context: Any, error: Exception) -> NoReturn:
    failure = to_failure(error)
    code = next(each for each in grpc.StatusCode if each.value[0] == failure.status.code)
    await context.abort(
        code,
        failure.status.message,
        (("grpc-status-details-bin", failure.status.SerializeToString()),),
    )
    raise AssertionError("abort raises")
