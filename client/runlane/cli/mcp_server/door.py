"""Streamable HTTP: the same tools at an address, behind the checks of the HTTP gateway.

Each assistant sends its own token, with which the tools call the server: nobody gets more than the
token permits. A server without access control checks no token; then the door has one of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from dataclasses import replace

from mcp.server.mcpserver import MCPServer
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.transport_security import TransportSecuritySettings
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Send

from runlane.cli.connection import Settings
from runlane.cli.mcp_server.server import build
from runlane.cli.terminal import echo
from runlane.errors import RunlaneError
from runlane_web.entry import Entry
from runlane_web.errors import Refused
from runlane_web.gateway import Gateway, Limits
from runlane_web.guard import Policy
from runlane_web.serving import Address, bind, make_server
from runlane_web.upstream import RETRY

PATH = "/mcp"

MAX_BODY = 4 << 20
"""Maximum size in bytes of a request, as large as the prompt of a run may be."""

MAX_CALLS = 200
"""Maximum number of calls at a time; a half of them of one caller.

The server limits the streams of a connection, and all calls share one.
"""

_token: ContextVar[str] = ContextVar("token")
"""The token of the request that is being served.

Every request is served apart from all others, so a call cannot get the token of another one.
"""


class McpDoor:
    """The only door of a gateway: everything but MCP is not found."""

    def __init__(self, server: MCPServer[None]) -> None:
        # The gateway has checked host, origin and size before.
        unchecked = TransportSecuritySettings(enable_dns_rebinding_protection=False)
        server.streamable_http_app(
            stateless_http=True, transport_security=unchecked, max_request_body_size=MAX_BODY
        )
        self._manager: StreamableHTTPSessionManager = server.session_manager
        self._running = AsyncExitStack()

    def serves(self, path: str) -> bool:
        """Returns True: nothing else is served."""
        return True

    async def start(self, entry: Entry) -> None:
        """Starts to serve."""
        await self._running.enter_async_context(self._manager.run())

    async def stop(self) -> None:
        """Ends the open calls."""
        await self._running.aclose()

    async def serve(self, request: Request, path: str, send: Send, entry: Entry) -> None:
        """Answers a request. Raises Refused, RunlaneError before it has begun to answer."""
        if path != PATH or request.method != "POST":
            status = 404 if path != PATH else 405
            answer = Response(f"POST {PATH} serves MCP\n", status, {"Allow": "POST"})
            await answer(request.scope, request.receive, send)
            return
        token = entry.token(request.headers.get("authorization"))
        await entry.check(token)
        body = await entry.body(request, token, MAX_BODY)
        async with entry.place(token):
            _token.set(token)
            receive = _again(body, request.receive)
            await self._manager.handle_request(request.scope, receive, send)


def _again(body: bytes, receive: Receive) -> Receive:
    """Returns what a body that was read looks like before it was."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


@asynccontextmanager
async def opened(
    settings: Settings, policy: Policy, *, allow_answers: bool, max_text: int
) -> AsyncIterator[Gateway]:
    """Makes a gateway that serves nothing but MCP.

    Args:
        settings: The server and how to connect to it.
        policy: The requests to admit.
        allow_answers: Let assistants answer the questions of agents.
        max_text: Maximum number of characters of one text in a result.
    """
    access = settings if policy.token else replace(settings, token=_token.get)
    async with access.client(RETRY) as client:
        door = McpDoor(build(client, allow_answers=allow_answers, max_text=max_text))
        limits = Limits(streams=MAX_CALLS, streams_per_caller=MAX_CALLS // 2)
        yield Gateway(settings.wire(RETRY), policy, limits, [door])


async def serve_http(
    settings: Settings, policy: Policy, address: Address, *, allow_answers: bool, max_text: int
) -> None:
    """Serves MCP over HTTP until SIGINT or SIGTERM; prints the address. For the rest see `opened`.

    Raises OSError if the address cannot be bound.
    """
    sockets = bind(address)
    async with opened(settings, policy, allow_answers=allow_answers, max_text=max_text) as gateway:
        bound = replace(address, port=sockets[0].getsockname()[1])
        echo(f"runlane mcp listening on {bound.url}{PATH}")
        checking = asyncio.create_task(_warn_if_open(gateway))
        try:
            await make_server(gateway, address).serve(sockets=sockets)
        finally:
            checking.cancel()
            await asyncio.wait({checking})


async def _warn_if_open(gateway: Gateway) -> None:
    """Warns if every request will be refused, as any word would do as a token of the server."""
    try:
        await gateway.check_server()
    except Refused as error:
        echo(f"runlane mcp: warning: every request will be refused: {error}", err=True)
    except RunlaneError:
        pass  # the answer to a request reports it
