"""Wraps every handler: access control, errors as statuses, logs and metrics of calls.

This covers the health and reflection services too. A `CancelledError` without a cancel of the call
never leaves a handler, because the peer would wait for its own deadline (grpc#29248). A cancel of
the call is never swallowed, because grpc leaks memory then (grpc#43360).
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

from runlane_server.access.caller import CALLER, CREDENTIALS, Credentials, Role
from runlane_server.access.certificate import certificate_names
from runlane_server.access.control import AccessControl, OpenCall
from runlane_server.access.log_limit import LogLimit
from runlane_server.access.permissions import PUBLIC_METHODS, REQUIRED_ROLES
from runlane_server.core.errors import RunlaneError
from runlane_server.core.observer import NO_OBSERVER, Observer
from runlane_server.rpc import audit
from runlane_server.rpc.errors import WireError, internal_error, wire_error
from runlane_server.rpc.inflight import InflightCalls
from runlane_server.rpc.requests import (
    RefusedRequest,
    RequestReader,
    bounded,
    malformed,
    number_of_ids,
)

log = structlog.get_logger()

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Behavior: TypeAlias = "Callable[[Any, Context], Awaitable[Any]]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

SLOW_REQUEST = 0.1
"""Seconds; if a request took longer to arrive, its caller is checked again before it is served."""

_QUIET_CODES = (None, StatusCode.OK, StatusCode.CANCELLED, StatusCode.UNAUTHENTICATED)
"""Codes of calls that are logged at level debug only. Failed authentications have their own log,
whose rate is bounded."""


class Middleware:
    """Passed in place of a server to the generated functions that add services to it.

    It wraps each handler once. An interceptor would repeat this work at every call.
    """

    def __init__(
        self,
        server: grpc.aio.Server,
        inflight: InflightCalls,
        access: AccessControl,
        observer: Observer = NO_OBSERVER,
        *,
        has_certificates: bool = True,
    ) -> None:
        """`has_certificates`: callers may have one. To look for it takes time at each call."""
        self._server = server
        self._has_certificates = has_certificates
        self._observer = observer
        self._inflight = inflight
        self._access = access
        self._log_limit = LogLimit(time.monotonic)
        self._requests = RequestReader()

    def add_generic_rpc_handlers(
        self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler]
    ) -> None:
        """Adds nothing: the generated functions add each method twice, and the other way is used.

        A generic handler is found by the path of a call, which gRPC would have to decode.
        """

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, Handler]
    ) -> None:
        """Adds a service."""
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
            behavior = _write_responses(behavior)
        # Registered as streaming its requests, a method is called before its request is read.
        make = getattr(grpc, f"stream_{responses}_rpc_method_handler")
        wrapped: Handler = make(
            self._supervise(behavior, method, handler),
            request_deserializer=bounded(handler.request_deserializer or bytes, method),
            response_serializer=_serialize,
        )
        return wrapped

    def _supervise(self, behavior: Behavior, method: str, handler: Handler) -> Behavior:
        """Returns a handler that checks access, always ends with a status, and logs the call."""
        name = method.rpartition(".")[2]
        streams = handler.response_streaming
        serve = self._admit(behavior, handler, method)
        # Successful calls are logged at level debug: they are as many as runs and health probes.

        async def call(requests: Any, context: Context) -> Any:
            began = time.perf_counter()
            task = cast("asyncio.Task[object]", asyncio.current_task())
            self._inflight.add(task, name)
            code: StatusCode | None = None
            reason = ""
            open_call = OpenCall(method, credentials_of(context, self._has_certificates), task)
            try:
                try:
                    return await serve(open_call, requests, context)
                except grpc.aio.AbortError:
                    code = context.code()
                    raise
                except BaseException as error:
                    code, failure = _outcome(open_call.revocation or error, task)
                    reason = getattr(open_call.revocation or error, "reason", "")
                    if failure is None:
                        raise
                # Here the error is gone. gRPC keeps what abort raises in a cycle, and with it would
                # keep the frames of the error, which hold the request and the answer.
                await _abort(context, failure)
            finally:
                self._inflight.discard(task)
                seconds = time.perf_counter() - began
                status = code.name if code else "OK"
                self._observer.on_call_ended(name, status, reason, None if streams else seconds)
                ms = round(seconds * 1000, 3)
                if code in _QUIET_CODES or method in PUBLIC_METHODS:
                    log.debug("call", method=name, code=status, ms=ms)
                else:
                    self._log_refused(open_call, method=name, code=status, reason=reason, ms=ms)

        return call

    def _log_refused(self, call: OpenCall, **fields: object) -> None:
        peer = call.credentials.peer
        caller = f"{call.caller.tenant}/{call.caller.name}" if call.caller.name else _host(peer)
        if self._log_limit.admits(caller):
            log.info("call", **fields, peer=peer)

    def _admit(
        self, behavior: Behavior, handler: Handler, method: str
    ) -> Callable[[OpenCall, Any, Context], Awaitable[Any]]:
        """Returns the part of a handler that admits a call, reads its request, and answers it."""
        # The answer to a change is sent in any case.
        may_refuse = REQUIRED_ROLES.get(method) is Role.READ
        is_audited = audit.is_audited(method)

        async def serve(call: OpenCall, requests: Any, context: Context) -> Any:
            call.caller = self._access.identify(method, call.credentials)
            CALLER.set(call.caller)
            CREDENTIALS.set(call.credentials)
            if call.caller.name:
                bind_contextvars(caller=call.caller.name)
            self._access.permit(call.caller, method)
            in_flight = self._access.begin(call, context.peer())
            _when_done(context, in_flight.close)
            self._access.register(call)
            try:
                request = requests
                if not handler.request_streaming:
                    began = time.monotonic()
                    request = await self._requests.read(context, call)
                    if time.monotonic() - began > SLOW_REQUEST:
                        self._access.confirm(call)
                    if ids := number_of_ids(request):
                        self._access.weigh(call, ids)
                if handler.response_streaming:
                    reply = _RevocableContext(context, call)
                    return await behavior(request, cast("Context", reply))
                answer = _serialize(await behavior(request, context))
                if is_audited:
                    audit.record(method, call.caller, call.credentials.peer, request)
                in_flight.answer(len(answer), may_refuse=may_refuse)
                return answer
            finally:
                self._access.unregister(call)

        return serve


class _RevocableContext:
    """The context of a streaming call, which ends a revoked call between two writes.

    A write that is cancelled continues inside gRPC, where no status can be sent beside it, so the
    call would hang until its caller gives up. A caller that does not read blocks its last write. It
    receives the error once it reads on; nothing more is written for it.
    """

    def __init__(self, context: Context, call: OpenCall) -> None:
        self._context = context
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    @property
    def is_revoked(self) -> bool:
        """Whether the caller has lost access."""
        return self._call.revocation is not None

    async def write(self, message: Any) -> None:
        """Writes a message. Raises the revocation of the call, if any."""
        await self._send(self._context.write(message))

    async def send_initial_metadata(self, metadata: Any) -> None:
        """Sends the initial metadata, with the same rules as `write`."""
        await self._send(self._context.send_initial_metadata(metadata))

    async def _send(self, sending: Awaitable[None]) -> None:
        # No context manager: it would cost a twentieth of writing a small message.
        call = self._call
        call.is_sending = True
        try:
            await sending
        finally:
            call.is_sending = False
        call.raise_if_revoked()


def _when_done(context: Context, act: Callable[[], None]) -> None:
    """Calls `act` once the answer of a call was sent, or its caller has left."""
    # The stubs want an object that is no function.
    cast("Any", context).add_done_callback(lambda _: act())


def credentials_of(context: Context, has_certificates: bool) -> Credentials:
    """Returns the credentials of a call; the first value of a metadata key counts."""
    pairs = cast("Sequence[tuple[str, str]]", context.invocation_metadata() or ())
    metadata = dict(reversed(pairs))
    certificates = context.auth_context().get("x509_pem_cert", ()) if has_certificates else ()
    names = next((certificate_names(pem) for pem in certificates), ())
    return Credentials(metadata, names, context.peer() or "")


def _host(peer: str) -> str:
    """Returns an address without its port, which changes with each connection."""
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer


def _outcome(
    error: BaseException, task: asyncio.Task[object]
) -> tuple[StatusCode, WireError | None]:
    """Maps an exception to a code and an error for the peer; None if the peer has left."""
    match error:
        case RunlaneError():
            failure = wire_error(error)
        case DecodeError():
            failure = wire_error(malformed())
        case asyncio.CancelledError() if task.cancelling():
            return StatusCode.CANCELLED, None
        case grpc.aio.InternalError():
            # The peer left during a write (ExecuteBatchError).
            return StatusCode.CANCELLED, None
        case asyncio.CancelledError():
            failure = _log_defect(error, StatusCode.ABORTED)
        case Exception():
            failure = _log_defect(error, StatusCode.INTERNAL)
        case _:
            return StatusCode.UNKNOWN, None
    return failure.code, failure


async def _abort(context: Context, failure: WireError) -> Never:
    await context.abort(failure.code, failure.message, failure.trailing_metadata)


def _log_defect(error: BaseException, code: StatusCode) -> WireError:
    """Logs an unexpected exception, whose text stays in the log."""
    failure, error_id = internal_error(code)
    log.error("call failed unexpectedly", error_id=error_id, exc_info=error)
    return failure


def _serialize(response: Encoded | bytes) -> bytes:
    """Serializes a response, unless it was serialized before for many subscribers."""
    return response if isinstance(response, bytes) else response.SerializeToString()


def _write_responses(behavior: Callable[[Any, Context], AsyncGenerator[Any, None]]) -> Behavior:
    """Returns a handler that writes what an async generator yields.

    grpc would close the generator in another task when the call is cancelled.
    """

    async def call(requests: Any, context: Context) -> None:
        decoded = _well_formed(requests) if hasattr(requests, "__aiter__") else requests
        async with aclosing(behavior(decoded, context)) as responses:
            async for response in responses:
                await context.write(response)

    return call


async def _well_formed(requests: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
    """Yields the messages of a stream. Raises InvalidArgument at a malformed one."""
    async for request in requests:
        if isinstance(request, RefusedRequest):
            raise request.error
        yield request
