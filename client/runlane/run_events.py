"""What happens in one run, as it comes, over lost connections and restarted servers."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc.aio

from runlane import convert
from runlane.errors import EventGap, RunlaneError, Unavailable
from runlane.stream import ResumingStream
from runlane.tokens import Metadata
from runlane.types import RunComplete, RunEvent
from runlane.v1 import run_service_pb2 as pb
from runlane.wire import Wire


class RunEvents:
    """An iterator over the events of a run that ends after its `RunComplete`.

    `Client.subscribe_run` and `RunHandle.events` make it. It goes on by itself after a lost
    connection, with the event after the last one it delivered. A later `Started` with an `attempt`
    above 1 means that the run starts over: deltas that came before do not count any more.

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
        """The index of the event last delivered: where `after_index` goes on."""
        return self._last_index

    async def aclose(self) -> None:
        """Ends the iteration and its call. May be repeated."""
        self._ended = True
        self._stream.drop()

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
                await self._stream.lost(Unavailable(text))
                continue
            index = message.event.index
            if index > self._last_index + 1:
                await self._gap(index)
                continue
            event = convert.run_event(message.event)
            if event is not None and isinstance(event.body, RunComplete):
                # The end is never taken for a duplicate, whatever its number.
                await self.aclose()
            elif event is None or index <= self._last_index:
                self._last_index = max(index, self._last_index)
                continue
            self._last_index = index
            return event
        raise StopAsyncIteration

    async def _gap(self, index: int) -> None:
        """Asks once more for what is missing before event `index`; the second time raises."""
        text = f"run {self._run_id}: event {index} came after event {self._last_index}"
        if self._gap_after == self._last_index:
            await self.aclose()
            raise EventGap(text)
        self._gap_after = self._last_index
        await self._stream.lost(Unavailable(text))

    def _open(self, metadata: Metadata) -> grpc.aio.UnaryStreamCall[Any, pb.SubscribeRunResponse]:
        request = pb.SubscribeRunRequest(run_id=self._run_id, after_index=self._last_index)
        return self._wire.runs.SubscribeRun(request, metadata=metadata)
