"""The gateway: takes HTTP requests, calls the server, and returns what it says."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from google.protobuf import json_format
from google.protobuf.message import Message as Proto
from google.rpc import code_pb2  # type: ignore[import-untyped]
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from runlane.errors import RunlaneError, Unauthenticated
from runlane.wire import Wire
from runlane_web import own
from runlane_web.assets import asset
from runlane_web.decode import KEYS, decode, set_key
from runlane_web.entry import Door
from runlane_web.errors import Refused, from_error, invalid, to_response
from runlane_web.grants import PREFIX, Grants, expired, other_session
from runlane_web.guard import MAX_OF_STRANGER, Bodies, Policy, declared_size
from runlane_web.known import KnownTokens
from runlane_web.routes import GET_RUN, LIST_AGENTS, MAX_BODY, Found, Route, find
from runlane_web.sse import EventStream, resume_after
from runlane_web.upstream import WAITS, Upstream

log = logging.getLogger("runlane_web")

MAX_PARAMETERS = 2100
"""Maximum number of parameters in a query. A subscription may name 2,000 ids."""

CHECK_SECONDS = 60.0
"""Seconds between two checks whether the server has access control."""

HEADERS = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
"""Headers of every answer that does not set them itself."""

CORS = (
    (b"access-control-allow-methods", b"GET, POST, PATCH, DELETE"),
    (
        b"access-control-allow-headers",
        b"authorization, content-type, idempotency-key, last-event-id, "
        b"mcp-method, mcp-name, mcp-protocol-version",
    ),
    (b"access-control-max-age", b"600"),
    (b"vary", b"Origin"),
)
"""Headers of the answers to a page of an allowed origin."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on what one gateway serves at a time.

    Attributes:
        streams: Maximum number of open streams and waiting calls.
        streams_per_caller: The same of one token.
    """

    streams: int = 3500
    streams_per_caller: int = 500


class Streams:
    """Counts open streams, in all and of each caller."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._open: Counter[str] = Counter()

    @asynccontextmanager
    async def place(self, caller: str) -> AsyncIterator[None]:
        """Takes a place for as long as the context lasts. Raises Refused."""
        limit = self._limits.streams_per_caller
        if self._open.total() >= self._limits.streams or self._open[caller] >= limit:
            raise Refused(
                code_pb2.RESOURCE_EXHAUSTED,
                "OVERLOADED",
                "too many streams are open; close some, or retry later",
                headers={"Retry-After": "1"},
            )
        self._open[caller] += 1
        try:
            yield
        finally:
            self._open[caller] -= 1
            if not self._open[caller]:
                del self._open[caller]


class Gateway:
    """The ASGI application.

    Args:
        wire: The channel to the server, without a token.
        policy: The requests to admit.
        limits: Limits on what is served at a time.
        doors: Other doors, with paths of their own.
    """

    def __init__(
        self,
        wire: Wire,
        policy: Policy,
        limits: Limits | None = None,
        doors: Sequence[Door] = (),
    ) -> None:
        self._wire = wire
        self._doors = doors
        self._calls = wire.apart()
        self._policy = policy
        self._bodies = Bodies()
        self._streams = Streams(limits or Limits())
        self._grants = Grants()
        self._known = KnownTokens(self._ask)
        self._checked_until = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._serve(Request(scope, receive), with_headers(send))
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                for door in self._doors:
                    await door.start(self)
                await send({"type": "lifespan.startup.complete"})
            else:
                for door in self._doors:
                    await door.stop()
                await self._wire.close()
                await self._calls.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _serve(self, request: Request, send: Send) -> None:
        other_site: str | None = None
        try:
            host = request.headers.get("host", "")
            self._policy.check_host(host)
            other_site = self._policy.check_origin(request.headers.get("origin"), host)
            if other_site is not None:
                send = with_cors(send, other_site)
                if request.method == "OPTIONS":
                    await Response(status_code=204)(request.scope, request.receive, send)
                    return
            await self._route(request, send)
        except Refused as error:
            await error.response()(request.scope, request.receive, send)
        except RunlaneError as error:
            await to_response(from_error(error))(request.scope, request.receive, send)
        except Exception:
            error_id = secrets.token_hex(8)
            log.exception("internal error %s", error_id)
            await _internal(error_id)(request.scope, request.receive, send)

    async def _route(self, request: Request, send: Send) -> None:
        path = raw_path(request)
        for door in self._doors:
            if door.serves(path):
                await door.serve(request, path, send, self)
                return
        answer = await self._own(request, path)
        if answer is not None:
            await answer(request.scope, request.receive, send)
            return
        found = find(request.method, path)
        ticket, query = _take_ticket(_query(request))
        token = self._token(request, ticket, path)
        body = await self._body(request, token, found.route.max_body)
        message = self._decode(request, found, query, body)
        upstream = await self._authorize(token, found.route, message)
        if found.route.streams:
            async with self._streams.place(self._grants.authority(token)):
                left = self._grants.seconds_left(token)
                await self._stream(request, send, found.route, message, upstream, left=left)
        elif found.route.rpc.name in WAITS:
            async with self._streams.place(self._grants.authority(token)):
                left = self._grants.seconds_left(token)
                await self._wait(request, send, found.route, message, upstream, left=left)
        else:
            done = await upstream.call(found.route, message)
            await _json(done)(request.scope, request.receive, send)

    async def _own(self, request: Request, path: str) -> Response | None:
        if request.method in ("GET", "HEAD"):
            return own.document() if path == own.DOCUMENT else asset(path)
        if request.method == "POST" and path in (own.TOKENS, own.TICKETS):
            return await self._make(request, path)
        return None

    async def _make(self, request: Request, path: str) -> Response:
        """Makes a token or a ticket, for a caller that the server knows."""
        grants = path == own.TICKETS
        token = self._policy.bearer(request.headers.get("authorization"), grants=grants)
        authority = self._grants.authority(token)
        await self._known.check(authority)
        body = await self._bodies.read(request, authority, MAX_BODY)
        await self._known.confirm(authority)
        return own.make(path, token, body, self._grants)

    async def _body(self, request: Request, token: str, limit: int) -> bytes:
        """Reads a body; a large one only of a caller that the server knows."""
        authority = self._grants.authority(token)
        size = declared_size(request, limit)
        is_large = size is None or size > MAX_OF_STRANGER
        if is_large:
            await self._known.check(authority)
        body = await self._bodies.read(request, authority, limit)
        if is_large:
            # Before it is parsed: the caller may have lost its access meanwhile.
            await self._known.confirm(authority)
        return body

    def _token(self, request: Request, ticket: str, path: str) -> str:
        if ticket:
            return self._grants.redeem(ticket, path)
        return self._policy.bearer(request.headers.get("authorization"))

    async def _authorize(self, token: str, route: Route, message: Proto) -> Upstream:
        """Returns the server as the holder of a token sees it. Raises Refused, RunlaneError."""
        await self.check_server()
        if not token.startswith(PREFIX):
            return self._upstream(token)
        grant = self._grants.find(token)
        upstream = self._upstream(grant.authority)
        if not grant.check(route, message):
            run_id: str = message.run_id  # type: ignore[attr-defined]
            found: Any = await upstream.call(GET_RUN, GET_RUN.request(run_id=run_id))
            if found.run.session_id != grant.session_id:
                raise other_session()
        return upstream

    async def check_server(self) -> None:
        """Checks that the server refuses calls without a token, unless this gateway has its own.

        Else any word would do as a token. Raises Refused, RunlaneError.
        """
        now = asyncio.get_running_loop().time()
        if self._policy.token or now < self._checked_until:
            return
        try:
            await Upstream(self._wire, self._calls).call(LIST_AGENTS, LIST_AGENTS.request())
        except Unauthenticated:
            self._checked_until = now + CHECK_SECONDS
            return
        raise Refused(
            code_pb2.FAILED_PRECONDITION,
            "SERVER_IS_OPEN",
            "the server has no access control; start runlane-web with --own-token, "
            "or runlane mcp with --own-token-file",
        )

    # --- For other doors: see `Entry` ------------------------------------------------------------

    def token(self, authorization: str | None) -> str:
        """Returns the token of a caller; that of a grant is not enough. Raises Refused."""
        return self._policy.bearer(authorization, grants=False)

    async def check(self, token: str) -> None:
        """Returns if the server accepts a token. Raises Refused, RunlaneError."""
        await self._known.check(token)

    async def body(self, request: Request, token: str, limit: int) -> bytes:
        """Reads a body, within limits of size and time. Raises Refused, RunlaneError."""
        return await self._body(request, token, limit)

    async def wires(self, token: str) -> tuple[Wire, Wire]:
        """Returns the channels of calls and of streams with the caller's token.

        Raises Refused, RunlaneError.
        """
        await self.check_server()
        if self._policy.token:
            return self._calls, self._wire
        return self._calls.with_token(lambda: token), self._wire.with_token(lambda: token)

    def place(self, token: str) -> AbstractAsyncContextManager[None]:
        """Takes a place for a stream or a waiting call. Raises Refused."""
        return self._streams.place(token)

    async def _ask(self, token: str) -> None:
        """Returns if the server accepts a token. Raises Refused, RunlaneError."""
        await self.check_server()
        # The gateway's own token was compared before.
        if not self._policy.token:
            await self._upstream(token).call(LIST_AGENTS, LIST_AGENTS.request())

    def _upstream(self, token: str) -> Upstream:
        # A server without access control has no use for the gateway's own token.
        if self._policy.token:
            return Upstream(self._wire, self._calls)
        return Upstream(*(each.with_token(lambda: token) for each in (self._wire, self._calls)))

    def _decode(
        self, request: Request, found: Found, query: list[tuple[str, str]], body: bytes
    ) -> Proto:
        route = found.route
        message = decode(route, found.fields, query, body)
        key = request.headers.get("idempotency-key")
        field = KEYS.get(route.rpc.name)
        if key is not None and field is not None:
            set_key(message, field, key)
        return message

    async def _stream(
        self,
        request: Request,
        send: Send,
        route: Route,
        message: Proto,
        upstream: Upstream,
        *,
        left: float | None,
    ) -> None:
        """Streams to the caller, for `left` seconds at most."""
        last = request.headers.get("last-event-id")
        if last:
            resume_after(route, message, last)
        stream = EventStream(upstream, route, message, resumed=bool(last), seconds=left)
        try:
            answer = await stream.response()
            await answer(request.scope, request.receive, send)
        finally:
            stream.close()

    async def _wait(
        self,
        request: Request,
        send: Send,
        route: Route,
        message: Proto,
        upstream: Upstream,
        *,
        left: float | None,
    ) -> None:
        """Calls an rpc that waits, for as long as the caller is there; `left` seconds at most."""
        call = asyncio.create_task(upstream.call(route, message))
        gone = asyncio.create_task(_until_gone(request.receive))
        try:
            first = asyncio.FIRST_COMPLETED
            done, _ = await asyncio.wait({call, gone}, timeout=left, return_when=first)
            if not done:
                raise expired()
            if call.done():
                await _json(call.result())(request.scope, request.receive, send)
        finally:
            call.cancel()
            gone.cancel()


def raw_path(request: Request) -> str:
    """The path as sent. Raises Refused."""
    raw: bytes = request.scope.get("raw_path") or request.scope["path"].encode()
    try:
        return raw.decode("ascii")
    except UnicodeDecodeError:
        raise invalid("path", "must be percent-encoded") from None


def _query(request: Request) -> list[tuple[str, str]]:
    raw: bytes = request.scope["query_string"]
    try:
        return parse_qsl(
            raw.decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=MAX_PARAMETERS,
        )
    except UnicodeDecodeError:
        raise invalid("query", "is not percent-encoded UTF-8") from None
    except ValueError:
        raise invalid("query", f"has more than {MAX_PARAMETERS} parameters") from None


def _take_ticket(query: list[tuple[str, str]]) -> tuple[str, list[tuple[str, str]]]:
    """Takes the ticket out of a query; EventSource can send no header."""
    tickets = [value for name, value in query if name == "ticket"]
    if len(tickets) > 1:
        raise invalid("ticket", "is given twice")
    return "".join(tickets), [each for each in query if each[0] != "ticket"]


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(message: Proto) -> Response:
    text = json_format.MessageToJson(message, indent=None, ensure_ascii=False)
    return Response(text, media_type="application/json")


def _internal(error_id: str) -> Response:
    """The answer for a bug: an id that the log explains, and nothing else."""
    message = f"internal error {error_id}; the log of the gateway has the details"
    return Refused(code_pb2.INTERNAL, "INTERNAL", message).response()


def with_headers(send: Send) -> Send:
    """Adds the headers that every answer has."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = list(message.get("headers", ()))
            names = {name.lower() for name, _ in own}
            own += [each for each in HEADERS if each[0] not in names]
            message = {**message, "headers": own}
        await send(message)

    return wrapped


def with_cors(send: Send, origin: str) -> Send:
    """Lets a page of an allowed origin read the answer."""
    more = [*CORS, (b"access-control-allow-origin", origin.encode("latin-1"))]

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await send(message)

    return wrapped
