"""Calls of the server on behalf of the callers, each with the credentials that the caller sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc.aio
from google.protobuf.message import Message

from runlane.errors import NotConnected, RunlaneError
from runlane.stream import ResumingStream
from runlane.wire import RetryPolicy, Wire
from runlane_web.routes import Route

TIMEOUT = 60.0
"""Maximum duration of a call in seconds."""

SILENCE = 45.0
"""Seconds without a message after which a stream of marks counts as lost."""

WAITS = frozenset({"WaitRun"})
"""The rpcs whose callers say how long they wait."""


RETRY = RetryPolicy(attempts=6, maximum=0.5)
"""Long enough for a server that restarts."""


def _was_not_sent(error: RunlaneError) -> bool:
    return isinstance(error, NotConnected)


class Upstream:
    """The server, as one caller sees it.

    Args:
        wire: The channel of streams and waiting calls, with the caller's token.
        calls: The channel of the other calls. The server limits the calls of a channel, and open
            streams must not keep these waiting.
    """

    def __init__(self, wire: Wire, calls: Wire) -> None:
        self._wire = wire
        self._calls = calls

    async def call(self, route: Route, request: Message) -> Message:
        """Makes a call; repeats it only while it cannot be sent. Raises RunlaneError."""
        waits = route.rpc.name in WAITS
        wire = self._wire if waits else self._calls
        method = wire.channel.unary_unary(
            route.method,
            request_serializer=route.request.SerializeToString,
            response_deserializer=route.response.FromString,
        )
        timeout = 24 * 3600.0 if waits else TIMEOUT
        response: Message = await wire.call(
            method, request, timeout=timeout, should_retry=_was_not_sent
        )
        return response

    def follow(
        self, route: Route, request: Message, on_lost: Callable[[RunlaneError], None]
    ) -> ResumingStream[Message]:
        """Opens a stream; it continues after the messages received so far once it was lost.

        The request is changed in place: its field `route.resume` follows the messages received.
        """
        method: grpc.aio.UnaryStreamMultiCallable[Any, Any] = self._wire.channel.unary_stream(
            route.method,
            request_serializer=route.request.SerializeToString,
            response_deserializer=route.response.FromString,
        )
        return ResumingStream(
            self._wire,
            lambda metadata: method(request, metadata=metadata),
            silence=SILENCE if route.endless else None,
            on_lost=on_lost,
        )
