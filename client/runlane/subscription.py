"""The terminal events of runs, as they come, over lost connections and restarted servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc.aio

from runlane import convert
from runlane.errors import Draining, RunlaneError, Unavailable
from runlane.stream import ResumingStream
from runlane.tokens import Metadata
from runlane.types import Progress, RunComplete
from runlane.v1 import run_service_pb2 as pb
from runlane.wire import Wire

SILENCE = 45.0
"""After how many seconds without a message a stream counts as lost: three times the longest pause
that a server makes, which sends a progress mark at least every 15 s."""

REMEMBERED = 1024
"""How many terminal events are remembered to drop those that come twice. After a resume the server
sends later events only, so a duplicate is a fault of the server and comes close to its original."""


class Subscription:
    """An endless iterator over terminal events; `Client.subscribe_run_complete` makes it.

        async with client.subscribe_run_complete(session_ids=["s"]) as subscription:
            async for complete in subscription:
                ...
                save(subscription.cursor)

    As a context manager it is established on entry: all that ends from then on is delivered. Used
    as a bare iterator, it is established by the first step.

    It goes on by itself where it was, after a lost connection, a silent one, and a server that
    drains or restarts; each event is delivered once and in order. It raises `CursorCompacted` where
    events were removed that it has not delivered, and other errors that do not pass with time. A
    step that is cancelled or timed out loses nothing: the next one goes on. One task at a time.
    """

    def __init__(
        self,
        wire: Wire,
        *,
        session_ids: Sequence[str],
        run_ids: Sequence[str],
        cursor: str | None,
        from_beginning: bool,
        silence: float,
        max_silence: float | None = None,
        on_lost: Callable[[RunlaneError], None] | None = None,
    ) -> None:
        self._wire = wire
        self._session_ids = tuple(session_ids)
        self._run_ids = tuple(run_ids)
        self._cursor = cursor
        self._from_beginning = from_beginning
        self._on_lost = on_lost
        self._stream = ResumingStream(
            wire, self._open, silence=silence, max_silence=max_silence, on_lost=self._lost
        )
        # The keys of a dict stay in order, so the first one is the oldest.
        self._delivered: dict[tuple[str, str, int], None] = {}
        self._first: RunComplete | Progress | None = None
        self._started = False
        self._closed = False

    @property
    def cursor(self) -> str | None:
        """Where a new subscription goes on after the event last delivered; opaque.

        Progress marks move it too. None before the subscription is established, unless it was
        given one.
        """
        return self._cursor

    async def start(self) -> None:
        """Establishes the subscription: all that ends from now on is delivered.

        Waits until the server answered, however long that takes (within max_silence).
        """
        if not self._started:
            self._first = await self._next()

    async def aclose(self) -> None:
        """Ends the subscription and its call. May be repeated."""
        self._closed = True
        self._stream.drop()

    def with_progress(self) -> AsyncIterator[RunComplete | Progress]:
        """Iterates over progress marks too. They tell how far an idle stream has come."""
        return _WithProgress(self)

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RunComplete:
        while True:
            item = await self.next_item()
            if isinstance(item, RunComplete):
                return item

    async def next_item(self) -> RunComplete | Progress:
        """The next terminal event or progress mark. StopAsyncIteration after `aclose`."""
        if self._closed:
            raise StopAsyncIteration
        if self._first is not None:
            item, self._first = self._first, None
            return item
        return await self._next()

    async def _next(self) -> RunComplete | Progress:
        while True:
            message = await self._stream.read()
            if message is None:
                # A subscription has no end of its own.
                await self._stream.lost(Unavailable("the server ended the subscription"))
                continue
            self._started = True
            self._cursor = message.cursor
            if message.WhichOneof("event") != "run_complete":
                return convert.progress(message)
            if self._is_new(message.run_complete):
                return convert.run_complete(message.run_complete)

    def _is_new(self, complete: Any) -> bool:
        # A run id may be used again once its session was deleted; the time tells the two apart.
        key = (complete.session_id, complete.run_id, complete.ended_at.ToNanoseconds())
        if key in self._delivered:
            return False
        self._delivered[key] = None
        if len(self._delivered) > REMEMBERED:
            del self._delivered[next(iter(self._delivered))]
        return True

    def _open(
        self, metadata: Metadata
    ) -> grpc.aio.UnaryStreamCall[Any, pb.SubscribeRunCompleteResponse]:
        request = pb.SubscribeRunCompleteRequest(
            session_ids=self._session_ids, run_ids=self._run_ids
        )
        if self._cursor is not None:
            request.cursor = self._cursor
        elif self._from_beginning:
            request.from_beginning = True
        return self._wire.runs.SubscribeRunComplete(request, metadata=metadata)

    def _lost(self, error: RunlaneError) -> None:
        # Our own cursor is what we have surely received. Without one, the server's is better than
        # none: it is where this subscription was to begin.
        if self._cursor is None and not self._from_beginning and isinstance(error, Draining):
            self._cursor = error.cursor or None
        if self._on_lost is not None:
            self._on_lost(error)


class _WithProgress:
    """The items of a subscription, progress marks included."""

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RunComplete | Progress:
        return await self._subscription.next_item()
