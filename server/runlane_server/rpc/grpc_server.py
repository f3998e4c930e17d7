"""The server of grpc.aio, made safe against calls of unknown methods.

grpc.aio decodes the path of such a call as UTF-8 in its main loop, so a path that is not UTF-8 ends
the whole server (seen with 1.85). All methods of Runlane are registered with the core of gRPC,
which compares their paths as bytes. Every other call is refused here before its path is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from threading import Lock
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

_ANY_PATH = "/unknown"
"""Stands for the path of the call, which nothing reads."""

_NO_METHODS = cygrpc._MethodResolver([], {})  # noqa: SLF001


_creating = Lock()
"""Held while the class of gRPC's inner server is replaced."""


def make_server(options: Sequence[tuple[str, Any]]) -> grpc.aio.Server:
    """Creates a server that serves registered methods only."""
    # The constructor of grpc.aio offers no other way to replace its inner server. Tests create
    # servers in several threads.
    with _creating:
        original = cygrpc.AioServer
        cygrpc.AioServer = _RegisteredOnly
        try:
            return grpc.aio.server(options=options)
        finally:
            cygrpc.AioServer = original


class _RegisteredOnly(cygrpc.AioServer):  # type: ignore[misc]
    """Answers UNIMPLEMENTED to each call that has no registered method."""

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        accept = super()._make_request_call_future
        if method is not None:
            future: asyncio.Future[Any] = accept(method)
            return future
        # The main loop waits for a call without a method; it never gets one.
        return asyncio.ensure_future(self._refuse_all(accept))

    async def _refuse_all(self, accept: Any) -> None:
        """Refuses calls until the server stops, which ends the wait for a call with an error."""
        loop = asyncio.get_running_loop()
        refusals: set[asyncio.Task[None]] = set()
        while True:
            state = await accept(None)
            refusal = cygrpc._handle_rpc(  # noqa: SLF001
                _ANY_PATH, _NO_METHODS, (), state, loop, False
            )
            task = loop.create_task(
                cygrpc._schedule_rpc_coro(  # noqa: SLF001
                    refusal, state, loop, _ANY_PATH
                )
            )
            refusals.add(task)
            task.add_done_callback(refusals.discard)
