"""Iterates over the events of one run, across lost connections and server restarts."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc.aio

from runlane import convert
from runlane.errors import EventGap, RunlaneError, Unavailable
from runlane.metadata import Metadata
from runlane.stream import ResumingStream
from runlane.types import RunComplete, RunEvent
from runlane.v1 import run_service_pb2 as pb
from runlane.wire import Wire


class RunEvents:
    """An iterator over the events of a run, which ends after its `RunComplete`.

    Created by `Client.subscribe_run` and `RunHandle.events`. After a lost connection it reconnects
    and continues after the last delivered event. A `Started` with an `attempt` above 1 means that
    the run starts over: discard earlier deltas.

    Closing it, leaving its context or cancelling a step ends the call, never the run.
    """

    def __init__(
        self,
        wire: Wire,
        run_id: str,
        *,
        after_index: int = 0,
        on_lost: Callable[[RunlaneError], None] | None = None,
    ) -> None:
        self._wire = wire
        self._run_id = run_id
        self._last_index = after_index
        self._stream = ResumingStream(wire, self._open, on_lost=on_lost)
        self._gap_after: int | None = None
        self._ended = False

    @property
    def last_index(self) -> int:
        """The index of the last delivered event; pass it as `after_index` to resume."""
        return self._last_index

    async def aclose(self) -> None:
        """Ends the iteration and its call. Idempotent."""
        self._ended = True
        self._stream.cancel_call()

    async def __aenter__(self) -> Self:
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

    async def __anext__(self) -> RunEvent:
        while not self._ended:
            message = await self._stream.read()
            if message is None:
                text = f"the stream of run {self._run_id} ended before the run"
                await self._stream.pause_or_raise(Unavailable(text))
                continue
            if message.HasField("progress"):
                continue
            index = message.event.index
            if index > self._last_index + 1:
                await self._refetch_gap(index)
                continue
            event = convert.run_event(message.event)
            if event is not None and isinstance(event.body, RunComplete):
                # The end is always delivered, even if its index looks like a duplicate.
                await self.aclose()
            elif event is None or index <= self._last_index:
                self._last_index = max(index, self._last_index)
                continue
            self._last_index = index
            return event
        raise StopAsyncIteration

    async def _refetch_gap(self, index: int) -> None:
        """Reconnects once to fetch the events missing before `index`; raises the second time."""
        text = f"run {self._run_id}: received event {index} after event {self._last_index}"
        if self._gap_after == self._last_index:
            await self.aclose()
            raise EventGap(text)
        self._gap_after = self._last_index
        await self._stream.pause_or_raise(Unavailable(text))

    def _open(self, metadata: Metadata) -> grpc.aio.UnaryStreamCall[Any, pb.SubscribeRunResponse]:
        request = pb.SubscribeRunRequest(run_id=self._run_id, after_index=self._last_index)
        return self._wire.runs.SubscribeRun(request, metadata=metadata)
