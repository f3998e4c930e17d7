"""What stands around every handler: errors become statuses, calls are logged and counted.

It covers the health and reflection services too. It never lets a `CancelledError` out that nobody
asked for (the peer would wait for its own deadline, grpc#29248), and never keeps one in that the
peer asked for (grpc leaks memory then, grpc#43360).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from inspect import isasyncgenfunction
from typing import Any, Never, TypeAlias, cast

import grpc
import structlog
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Encoded
from grpc import StatusCode
from structlog.contextvars import bind_contextvars

from runlane_server.access.caller import CALLER, SHOWN, Credentials
from runlane_server.access.door import Door, Visit
from runlane_server.access.permissions import OPEN
from runlane_server.core.errors import InvalidArgument, RunlaneError, Violation
from runlane_server.core.observer import NO_OBSERVER, Observer
from runlane_server.rpc.calls import Calls
from runlane_server.rpc.careful import CarefulContext
from runlane_server.rpc.errors import Refusal, defect, refusal

log = structlog.get_logger()

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Behavior: TypeAlias = "Callable[[Any, Context], Awaitable[Any]]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

_AS_WISHED = (None, StatusCode.OK, StatusCode.CANCELLED, StatusCode.UNAUTHENTICATED)
"""How a call ends that nobody has to look at. Who is refused is told at the door, which does not
write a line for each call of whoever comes; nor is one written for a call that is open to all."""


class Guard:
    """Stands in for a server where services are added to it, and wraps their handlers.

    An interceptor would do the same at every call that this does once.
    """

    def __init__(
        self,
        server: grpc.aio.Server,
        calls: Calls,
        door: Door,
        observer: Observer = NO_OBSERVER,
    ) -> None:
        self._server = server
        self._observer = observer
        self._calls = calls
        self._door = door

    def add_generic_rpc_handlers(
        self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler]
    ) -> None:
        """Adds services. They are asked for their handlers once."""
        self._server.add_generic_rpc_handlers(
            tuple(_Wrapped(handlers, self._wrap) for handlers in generic_rpc_handlers)
        )

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, Handler]
    ) -> None:
        """Adds a service; these are found more quickly than the generic ones."""
        self._server.add_registered_method_handlers(
            service_name,
            {
                name: self._wrap(handler, f"/{service_name}/{name}")
                for name, handler in method_handlers.items()
            },
        )

    def _wrap(self, handler: Handler, method: str) -> Handler:
        requests = "stream" if handler.request_streaming else "unary"
        responses = "stream" if handler.response_streaming else "unary"
        behavior = cast("Behavior", getattr(handler, f"{requests}_{responses}"))
        if isasyncgenfunction(behavior):
            behavior = _writing(behavior)
        make = getattr(grpc, f"{requests}_{responses}_rpc_method_handler")
        wrapped: Handler = make(
            self._guarded(behavior, method, streams=handler.response_streaming),
            request_deserializer=_keeping_errors(handler.request_deserializer or bytes),
            response_serializer=_serialize,
        )
        return wrapped

    def _guarded(self, behavior: Behavior, method: str, *, streams: bool) -> Behavior:
        """A handler that always ends with a status, and leaves a line in the log."""
        name = method.rpartition(".")[2]
        # What went well is told on demand only: it would be a line for every run, and for every
        # probe for ever.

        async def call(request: Any, context: Context) -> Any:
            began = time.perf_counter()
            task = cast("asyncio.Task[object]", asyncio.current_task())
            self._calls.enter(task, name)
            code: StatusCode | None = None
            reason = ""
            visit = Visit(method, credentials_of(context), task)
            try:
                visit.caller = self._door.admit(method, visit.credentials)
                CALLER.set(visit.caller)
                SHOWN.set(visit.credentials)
                if visit.caller.name:
                    bind_contextvars(caller=visit.caller.name)
                if isinstance(request, _Malformed):
                    raise request.error
                self._door.enter(visit)
                try:
                    reply = CarefulContext(context, visit) if streams else context
                    return await behavior(request, cast("Context", reply))
                finally:
                    self._door.leave(visit)
            except grpc.aio.AbortError:
                code = context.code()
                raise
            except BaseException as error:
                code, refused = _verdict(visit.refused or error, task)
                reason = getattr(visit.refused or error, "reason", "")
                if refused is None:
                    raise
                await _abort(context, refused)
            finally:
                self._calls.leave(task)
                seconds = time.perf_counter() - began
                said = code.name if code else "OK"
                self._observer.on_call_ended(name, said, reason, None if streams else seconds)
                tell = log.debug if code in _AS_WISHED or method in OPEN else log.info
                tell("call", method=name, code=said, ms=round(seconds * 1000, 3))

        return call


def credentials_of(context: Context) -> Credentials:
    """What a call brings along to prove who makes it."""
    # The first value of a key counts.
    sent = cast("Sequence[tuple[str, str]]", context.invocation_metadata() or ())
    metadata = dict(reversed(sent))
    certificate = context.peer_identities() or ()
    return Credentials(metadata, tuple(name.decode(errors="replace") for name in certificate))


class _Wrapped(grpc.GenericRpcHandler):
    """The handlers of a service, each wrapped when it is first asked for."""

    def __init__(
        self, handlers: grpc.GenericRpcHandler, wrap: Callable[[Handler, str], Handler]
    ) -> None:
        self._handlers = handlers
        self._wrap = wrap
        self._known: dict[str, Handler] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        """The handler of a method; None where there is no such method."""
        method = handler_call_details.method
        known = self._known.get(method)
        if known is None:
            handler = self._handlers.service(handler_call_details)
            if handler is None:
                return None
            known = self._known[method] = self._wrap(handler, method)
        return known


def _verdict(error: BaseException, task: asyncio.Task[object]) -> tuple[StatusCode, Refusal | None]:
    """How a call ends that raised; without a refusal where there is nobody to tell."""
    match error:
        case RunlaneError():
            refused = refusal(error)
        case DecodeError():
            refused = refusal(_malformed())
        case asyncio.CancelledError() if task.cancelling():
            return StatusCode.CANCELLED, None
        case grpc.aio.InternalError():
            # The peer left while something was being written to it (ExecuteBatchError).
            return StatusCode.CANCELLED, None
        case asyncio.CancelledError():
            refused = _defect(error, StatusCode.ABORTED)
        case Exception():
            refused = _defect(error, StatusCode.INTERNAL)
        case _:
            return StatusCode.UNKNOWN, None
    return refused.code, refused


async def _abort(context: Context, refused: Refusal) -> Never:
    await context.abort(refused.code, refused.message, refused.trailing_metadata)


def _defect(error: BaseException, code: StatusCode) -> Refusal:
    """A defect of this server: its text is for the log only."""
    refused, error_id = defect(code)
    log.error("a call failed unexpectedly", error_id=error_id, exc_info=error)
    return refused


class _Malformed:
    """A request that could not be decoded; handed on in its place, so that it is answered."""

    def __init__(self, error: RunlaneError) -> None:
        self.error = error


def _malformed() -> InvalidArgument:
    # protobuf's own parser refuses strings that are not UTF-8, and does not say which.
    description = "is not a valid message of its type, or a string in it is not UTF-8"
    return InvalidArgument(
        f"request: {description}", violations=[Violation("request", description)]
    )


def _keeping_errors(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """grpc answers UNKNOWN where a deserializer raises; so this one does not."""

    def decode(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Malformed(_malformed())

    return decode


def _serialize(response: Encoded | bytes) -> bytes:
    """Lets through what was encoded already, once for many subscribers."""
    return response if isinstance(response, bytes) else response.SerializeToString()


def _writing(behavior: Callable[[Any, Context], AsyncGenerator[Any, None]]) -> Behavior:
    """Writes what an async generator yields.

    A generator that grpc iterates over itself is closed in another task when the call is cancelled.
    """

    async def call(requests: Any, context: Context) -> None:
        sent = _well_formed(requests) if hasattr(requests, "__aiter__") else requests
        async with aclosing(behavior(sent, context)) as responses:
            async for response in responses:
                await context.write(response)

    return call


async def _well_formed(requests: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
    """The messages of a stream. Raises InvalidArgument at one that could not be decoded."""
    async for request in requests:
        if isinstance(request, _Malformed):
            raise request.error
        yield request
