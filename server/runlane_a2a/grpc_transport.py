"""gRPC, on a port of its own: the facade is a client of the server, in a process of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio
from a2a.server.request_handlers.request_handler import RequestHandler
from a2a.utils.errors import InvalidRequestError
from google.protobuf.message import DecodeError, Message

from runlane_a2a.errors import refuse, to_failure
from runlane_a2a.operations import OPERATIONS, Operation, check_version
from runlane_a2a.settings import Caller, context_for

SERVICE = "lf.a2a.v1.A2AService"

MAX_MESSAGE = 4 << 20
"""Maximum size in bytes of a request."""

MAX_CALLS = 1000
"""Maximum number of calls in flight."""

GRACE = 5.0
"""Seconds that open calls get when the gateway stops."""

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", MAX_CALLS),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)

Enter: TypeAlias = Callable[[str | None, str], AbstractAsyncContextManager[Caller]]


class GrpcTransport:
    """Serves A2A over gRPC.

    Args:
        handler: The operations.
        enter: Returns a context with the caller, for the metadata `authorization` and
            `idempotency-key`. Raises Refused, RunlaneError.
    """

    def __init__(self, handler: RequestHandler, enter: Enter) -> None:
        self._handler = handler
        self._enter = enter
        self._server: grpc.aio.Server | None = None

    async def start(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        """Listens at an address; returns the port. Raises RuntimeError if it is taken."""
        server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
        handlers = {each.name: self._method(each) for each in OPERATIONS}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
        await server.start()
        self._server = server
        return port

    async def stop(self) -> None:
        """Ends the calls, and stops to listen."""
        if self._server is not None:
            await self._server.stop(GRACE)

    def _method(self, operation: Operation) -> grpc.RpcMethodHandler[Any, Any]:
        async def unary(request: bytes, context: Any) -> Message:
            try:
                async with self._caller(context) as caller:
                    check_version(_metadata(context, "a2a-version") or "")
                    message = _parse(operation, request)
                    return await operation.call(self._handler, message, context_for(caller))
            except Exception as error:  # noqa: BLE001 - it becomes the status
                await _abort(context, error)

        async def stream(request: bytes, context: Any) -> AsyncIterator[Message]:
            try:
                async with self._caller(context) as caller:
                    check_version(_metadata(context, "a2a-version") or "")
                    message = _parse(operation, request)
                    events = operation.stream(self._handler, message, context_for(caller))
                    try:
                        async for event in events:
                            yield event
                    finally:
                        await events.aclose()
            except Exception as error:  # noqa: BLE001 - it becomes the status
                await _abort(context, error)

        if operation.streams:
            return grpc.unary_stream_rpc_method_handler(stream, response_serializer=_serialize)
        return grpc.unary_unary_rpc_method_handler(unary, response_serializer=_serialize)

    def _caller(self, context: Any) -> AbstractAsyncContextManager[Caller]:
        return self._enter(
            _metadata(context, "authorization"), _metadata(context, "idempotency-key") or ""
        )


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _parse(operation: Operation, request: bytes) -> Message:
    """Parses a request, once the caller is known. Raises A2AError."""
    message = operation.request()
    try:
        message.ParseFromString(request)
    except DecodeError:
        raise refuse(InvalidRequestError, "is not a message of A2A", field="request") from None
    return message


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
