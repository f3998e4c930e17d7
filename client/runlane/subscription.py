"""Iterates over the terminal events of runs, across lost connections and server restarts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc.aio

from runlane import convert
from runlane.errors import Draining, RunlaneError, Unavailable
from runlane.metadata import Metadata
from runlane.stream import ResumingStream
from runlane.types import Progress, RunComplete
from runlane.v1 import run_service_pb2 as pb
from runlane.wire import Wire

SILENCE_SECONDS = 45.0
"""Seconds without a message after which a connection counts as lost: three times the default
interval of progress marks."""

DEDUPLICATED_EVENTS = 1024
"""Number of recent terminal events kept to drop duplicates. After a resume the server sends only
later events, so a duplicate is a server bug and follows its original closely."""


class Subscription:
    """An endless iterator over terminal events, created by `Client.subscribe_run_complete`.

        async with client.subscribe_run_complete(session_ids=["s"]) as subscription:
            async for complete in subscription:
                ...
                save(subscription.cursor)

    As a context manager it is established on entry: every run that ends later is delivered. As a
    plain iterator it is established by the first step.

    It resumes after a lost or silent connection, and when a server drains or restarts; each event
    is delivered exactly once and in order. It raises `CursorCompacted` if undelivered events were
    removed, and other permanent errors. A step that is cancelled or timed out loses nothing: the
    next one continues. One task at a time.
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
            wire, self._open, silence=silence, max_silence=max_silence, on_lost=self._handle_loss
        )
        # A dict keeps the order of insertion, so the first key is the oldest.
        self._delivered: dict[tuple[str, str, int], None] = {}
        self._first: RunComplete | Progress | None = None
        self._started = False
        self._closed = False

    @property
    def cursor(self) -> str | None:
        """The position after the last delivered event or progress mark; opaque.

        Pass it to a new subscription to resume. Before the subscription is established, it is the
        `cursor` argument.
        """
        return self._cursor

    async def start(self) -> None:
        """Establishes the subscription: every run that ends later is delivered.

        Waits for the server without a limit other than max_silence.
        """
        if not self._started:
            self._first = await self._next()

    async def aclose(self) -> None:
        """Ends the subscription and its call. Idempotent."""
        self._closed = True
        self._stream.cancel_call()

    def with_progress(self) -> AsyncIterator[RunComplete | Progress]:
        """Iterates over terminal events and progress marks."""
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
        """Returns the next event or progress mark. Raises StopAsyncIteration after `aclose`."""
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
                # A subscription is endless, so a normal end counts as a lost connection.
                await self._stream.pause_or_raise(Unavailable("the server ended the subscription"))
                continue
            self._started = True
            self._cursor = message.cursor
            if message.WhichOneof("event") != "run_complete":
                return convert.progress(message)
            if self._is_new(message.run_complete):
                return convert.run_complete(message.run_complete)

    def _is_new(self, complete: Any) -> bool:
        # A run id can be reused after its session was deleted; the time distinguishes the runs.
        key = (complete.session_id, complete.run_id, complete.ended_at.ToNanoseconds())
        if key in self._delivered:
            return False
        self._delivered[key] = None
        if len(self._delivered) > DEDUPLICATED_EVENTS:
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

    def _handle_loss(self, error: RunlaneError) -> None:
        # The own cursor reflects what was received. Without one, use the server's: it is the
        # position where this subscription was about to start.
        if self._cursor is None and not self._from_beginning and isinstance(error, Draining):
            self._cursor = error.cursor or None
        if self._on_lost is not None:
            self._on_lost(error)


class _WithProgress:
    """Iterates over the events and progress marks of a subscription."""

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RunComplete | Progress:
        return await self._subscription.next_item()
