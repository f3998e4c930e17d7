"""The door of a gateway for A2A: the card, JSON-RPC and REST below `/a2a`, and gRPC."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import grpc
from a2a.types import a2a_pb2 as pb
from google.rpc import code_pb2  # type: ignore[import-untyped]
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from runlane.client import over
from runlane.errors import PermissionDenied, RunlaneError, Unauthenticated
from runlane_a2a.card import JSON_RPC, PREFIX, WELL_KNOWN, CardDocument
from runlane_a2a.errors import to_failure
from runlane_a2a.grpc_transport import GrpcTransport
from runlane_a2a.handler import Handler
from runlane_a2a.http_transports import JsonRpc, Rest
from runlane_a2a.settings import Caller, Settings
from runlane_web.entry import Entry
from runlane_web.errors import Refused
from runlane_web.routes import not_allowed

_NO_ACCESS = (code_pb2.UNAUTHENTICATED, code_pb2.PERMISSION_DENIED)

MAX_BODY = 4 << 20
"""Maximum size in bytes of the body of a request."""


@dataclass(frozen=True, slots=True)
class GrpcListen:
    """The address of the gRPC transport.

    Attributes:
        address: Host and port.
        credentials: Those of TLS; None: plaintext.
    """

    address: str
    credentials: grpc.ServerCredentials | None = None


class A2ADoor:
    """Serves A2A.

    Args:
        card: The public card.
        settings: The settings.
        listen: The address of gRPC; None: it is not served.
    """

    def __init__(
        self, card: pb.AgentCard, settings: Settings, listen: GrpcListen | None = None
    ) -> None:
        settings = replace(settings, modes=tuple(card.default_input_modes))
        self._handler = Handler(settings, card)
        self._json_rpc = JsonRpc(self._handler)
        self._rest = Rest(self._handler)
        self._document = CardDocument(card, time.time())
        self._listen = listen
        self._grpc: GrpcTransport | None = None
        self.grpc_port = 0

    def serves(self, path: str) -> bool:
        """Returns True if the path is that of the card, or below `/a2a`."""
        return path == WELL_KNOWN or path.startswith(f"{PREFIX}/")

    async def serve(self, request: Request, path: str, send: Send, entry: Entry) -> None:
        """Answers a request. Raises Refused, RunlaneError."""
        if path == WELL_KNOWN:
            answer = self._card(request)
            await answer(request.scope, request.receive, send)
            return
        is_json_rpc = _is_json_rpc(path)
        try:
            if is_json_rpc and request.method != "POST":
                raise not_allowed(request.method, "POST")
            token = entry.token(request.headers.get("authorization"))
            key = request.headers.get("idempotency-key", "")
            body = await entry.body(request, token, MAX_BODY)
            async with _caller(entry, token, key) as caller:
                answer = await self._answer(request, path, body, caller)
                await answer(request.scope, request.receive, send)
        except (Unauthenticated, PermissionDenied):
            raise
        except (Refused, RunlaneError) as error:
            if isinstance(error, Refused) and error.status.code in _NO_ACCESS:
                raise
            is_call = is_json_rpc and request.method == "POST"
            answer = self._failure(error, is_json_rpc=is_call)
            await answer(request.scope, request.receive, send)

    async def start(self, entry: Entry) -> None:
        """Starts gRPC, if it is served."""
        if self._listen is None:
            return

        @asynccontextmanager
        async def enter(authorization: str | None, key: str) -> AsyncIterator[Caller]:
            token = entry.token(authorization)
            await entry.check(token)
            async with _caller(entry, token, key) as caller:
                yield caller

        self._grpc = GrpcTransport(self._handler, enter)
        self.grpc_port = await self._grpc.start(self._listen.address, self._listen.credentials)

    async def stop(self) -> None:
        """Stops gRPC. Idempotent."""
        serving, self._grpc = self._grpc, None
        if serving is not None:
            await serving.stop()

    def _card(self, request: Request) -> Response:
        if request.method not in ("GET", "HEAD"):
            raise not_allowed(request.method, "GET")
        return self._document.answer(request)

    async def _answer(self, request: Request, path: str, body: bytes, caller: Caller) -> Response:
        if _is_json_rpc(path):
            return await self._json_rpc.answer(request, body, caller)
        return await self._rest.answer(request, path.removeprefix(PREFIX), body, caller)

    def _failure(self, error: Exception, *, is_json_rpc: bool) -> Response:
        failure = to_failure(error)
        return self._json_rpc.failure(failure) if is_json_rpc else self._rest.failure(failure)


def _is_json_rpc(path: str) -> bool:
    """Some clients end the address with a slash."""
    return path in (JSON_RPC, f"{JSON_RPC}/")


@asynccontextmanager
async def _caller(entry: Entry, token: str, key: str) -> AsyncIterator[Caller]:
    """The caller of one call; the place that it takes is free again when the context ends."""
    calls, streams = await entry.wires(token)
    async with AsyncExitStack() as places:

        async def take_place() -> None:
            await places.enter_async_context(entry.place(token))

        yield Caller(over(calls), over(streams), take_place, key)
