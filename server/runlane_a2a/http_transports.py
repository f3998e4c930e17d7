"""JSON-RPC and REST."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any, TypeAlias

from a2a.server.request_handlers.request_handler import RequestHandler
from a2a.utils.errors import (
    A2AError,
    InvalidParamsError,
    InvalidRequestError,
    JSONParseError,
    MethodNotFoundError,
)
from a2a.utils.proto_utils import parse_params
from google.protobuf import json_format
from google.protobuf.message import Message
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from runlane.errors import PermissionDenied, Unauthenticated
from runlane_a2a.errors import Failure, json_rpc_error, refuse, rest_body, to_failure
from runlane_a2a.operations import BY_NAME, Operation, check_version, find, to_json
from runlane_a2a.settings import Caller, context_for
from runlane_web.decode import parse_object
from runlane_web.errors import Refused, shown
from runlane_web.sse import LINE_END, PING, SEND_TIMEOUT

RequestId: TypeAlias = str | int | None

Wrap: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]

_REST_TYPE = "application/a2a+json"


def parse_body(body: bytes) -> dict[str, Any]:
    """Parses a JSON object. Raises A2AError."""
    try:
        return parse_object(body)
    except Refused as error:
        problem = str(error).removeprefix("body: ")
        if body.lstrip()[:1] == b"{":
            raise JSONParseError(problem) from None
        kind = InvalidRequestError if problem == "must be a JSON object" else JSONParseError
        raise kind(problem) from None


def request_id(fields: Mapping[str, Any]) -> RequestId:
    """The id of a JSON-RPC request; None if it has none that can be sent back."""
    value = fields.get("id")
    return value if isinstance(value, str | int) and not isinstance(value, bool) else None


class JsonRpc:
    """JSON-RPC 2.0 (https://www.jsonrpc.org/specification)."""

    def __init__(self, handler: RequestHandler) -> None:
        self._handler = handler

    async def answer(self, request: Request, body: bytes, caller: Caller) -> Response:
        """Answers a request; an error has the HTTP code 200, as JSON-RPC has codes of its own."""
        key: RequestId = None
        try:
            fields = parse_body(body)
            key = request_id(fields)
            operation, params = _call_of(fields)
            check_version(request.headers.get("a2a-version", ""))
            message = _parse(params, operation)
            return await _run(
                operation,
                self._handler,
                message,
                caller,
                request,
                wrap=lambda result: {"jsonrpc": "2.0", "id": key, "result": result},
                fail=lambda failure: _json_rpc_failure(failure, key),
            )
        except (Unauthenticated, PermissionDenied):
            raise
        except Exception as error:  # noqa: BLE001 - it becomes the answer
            return self.failure(to_failure(error), key)

    @staticmethod
    def failure(failure: Failure, key: RequestId = None) -> Response:
        """The answer of a failed request."""
        return JSONResponse(_json_rpc_failure(failure, key), headers=_retry_header(failure))


class Rest:
    """HTTP+JSON."""

    def __init__(self, handler: RequestHandler) -> None:
        self._handler = handler

    async def answer(self, request: Request, path: str, body: bytes, caller: Caller) -> Response:
        """Answers a request; `path` is the one below the prefix."""
        try:
            operation, variables = find(request.method, path)
            version = request.headers.get("a2a-version") or request.query_params.get("A2A-Version")
            check_version(version or "")
            message = _rest_message(operation, request, body, variables)
            return await _run(
                operation,
                self._handler,
                message,
                caller,
                request,
                wrap=lambda result: result,
                fail=rest_body,
                media_type=_REST_TYPE,
            )
        except Exception as error:  # noqa: BLE001 - it becomes the answer
            return self.failure(to_failure(error))

    @staticmethod
    def failure(failure: Failure) -> Response:
        """The answer of a failed request."""
        return JSONResponse(rest_body(failure), failure.http, _retry_header(failure))


def _call_of(fields: Mapping[str, Any]) -> tuple[Operation, dict[str, Any]]:
    if fields.get("jsonrpc") != "2.0":
        raise refuse(InvalidRequestError, "must be 2.0", field="jsonrpc")
    if request_id(fields) is None and fields.get("id") is not None:
        raise refuse(InvalidRequestError, "must be a string, an integer or null", field="id")
    method = fields.get("method")
    if not isinstance(method, str) or not method:
        raise refuse(InvalidRequestError, "must be a string", field="method")
    operation = BY_NAME.get(method)
    if operation is None:
        raise refuse(MethodNotFoundError, f"{shown(method)} does not exist", field="method")
    params = fields.get("params", {})
    if not isinstance(params, dict):
        raise refuse(InvalidParamsError, "must be an object", field="params")
    return operation, params


def _parse(fields: dict[str, Any], operation: Operation) -> Message:
    """Unknown fields are those of later versions of A2A, and ignored. Raises A2AError."""
    try:
        message = json_format.ParseDict(fields, operation.request(), ignore_unknown_fields=True)
    except Exception as error:  # noqa: BLE001 - its kinds are not documented
        raise InvalidParamsError(f"params: {shown(str(error), 300)}") from None
    return _with_known_values(message, fields)


def _with_known_values(message: Message, fields: Mapping[str, Any]) -> Message:
    """An unknown word of an enum is dropped by the parser, and would be no filter at all.

    Raises A2AError.
    """
    for field in message.DESCRIPTOR.fields:
        given = fields.get(field.json_name)
        if field.enum_type is None or not given or getattr(message, field.name):
            continue
        if given not in ("0", field.enum_type.values[0].name):
            raise refuse(InvalidParamsError, "is no known value", field=field.json_name)
    return message


def _rest_message(
    operation: Operation, request: Request, body: bytes, variables: Mapping[str, str]
) -> Message:
    if operation.verb == "POST":
        message = _parse(parse_body(body), operation)
    else:
        message = operation.request()
        try:
            parse_params(request.query_params, message)
        except Exception as error:  # noqa: BLE001 - its kinds are not documented
            raise InvalidParamsError(f"query: {shown(str(error), 300)}") from None
        _with_known_values(message, request.query_params)
    for name, value in variables.items():
        setattr(message, name, value)
    return message


async def _run(
    operation: Operation,
    handler: RequestHandler,
    message: Message,
    caller: Caller,
    request: Request,
    *,
    wrap: Wrap,
    fail: Callable[[Failure], dict[str, Any]],
    media_type: str = "application/json",
) -> Response:
    if operation.streams:
        events = operation.stream(handler, message, context_for(caller))
        return await _stream(events, wrap, fail)
    result = await _while_there(operation.call(handler, message, context_for(caller)), request)
    return JSONResponse(wrap(to_json(result, message)), media_type=media_type)


async def _while_there(call: Any, request: Request) -> Message:
    """Waits for a call as long as the caller is there."""
    task: asyncio.Task[Message] = asyncio.ensure_future(call)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _Gone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


class _Gone(A2AError):
    """The caller has gone; nobody reads the answer."""


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(
    events: AsyncGenerator[Message, None],
    wrap: Wrap,
    fail: Callable[[Failure], dict[str, Any]],
) -> Response:
    """A stream of events; an error before the first is an answer of its own."""
    async with AsyncExitStack() as closing:
        closing.push_async_callback(events.aclose)
        first = await anext(events)
        closing.pop_all()
    return EventSourceResponse(
        _events(first, events, wrap, fail),
        ping=PING,
        send_timeout=SEND_TIMEOUT,
        sep=LINE_END,
        headers={"Cache-Control": "no-store"},
    )


async def _events(
    first: Message,
    events: AsyncGenerator[Message, None],
    wrap: Wrap,
    fail: Callable[[Failure], dict[str, Any]],
) -> AsyncIterator[ServerSentEvent]:
    try:
        yield _event(wrap(json_format.MessageToDict(first)))
        async for message in events:
            yield _event(wrap(json_format.MessageToDict(message)))
    except Exception as error:  # noqa: BLE001 - it becomes the last event
        yield _event(fail(to_failure(error)), name="error")
    finally:
        await events.aclose()


def _event(value: dict[str, Any], name: str | None = None) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(value, ensure_ascii=False), event=name, sep=LINE_END)


def _json_rpc_failure(failure: Failure, key: RequestId) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": key, "error": json_rpc_error(failure)}


def _retry_header(failure: Failure) -> dict[str, str]:
    return {} if failure.retry_after is None else {"Retry-After": str(failure.retry_after)}
