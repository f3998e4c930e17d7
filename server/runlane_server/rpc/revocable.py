"""The context of a call that streams, for handlers that may be stopped."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, TypeAlias

import grpc

from runlane_server.access.control import OpenCall

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class RevocableContext:
    """Has a call that may not go on end between two writes, and not within one.

    A write that was cancelled goes on in gRPC, where no status can be sent beside it: the call
    would hang until its caller gives up. A caller that does not read holds its last write up, and
    hears of its end once it reads on; nothing more is written for it.
    """

    def __init__(self, context: Context, call: OpenCall) -> None:
        self._context = context
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        """Writes a message. Raises what the call is refused for meanwhile."""
        await self._send(self._context.write(message))

    async def send_initial_metadata(self, metadata: Any) -> None:
        """The same for what comes before the messages."""
        await self._send(self._context.send_initial_metadata(metadata))

    async def _send(self, sending: Awaitable[None]) -> None:
        # A context manager would cost a twentieth of a small message.
        call = self._call
        call.is_sending = True
        try:
            await sending
        finally:
            call.is_sending = False
        call.raise_if_revoked()
