"""A server stream that is opened again after it was lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import grpc.aio

from runlane import errors
from runlane.errors import RunlaneError, Unavailable
from runlane.tokens import Metadata
from runlane.wire import Backoff, Wire, cancelled_by_caller

log = logging.getLogger("runlane")

ResponseT = TypeVar("ResponseT")

RENEWAL_SECONDS = 5.0
"""A stream that is refused again within this time after its token was renewed is refused."""


class ResumingStream(Generic[ResponseT]):
    """Reads the messages of a server stream over as many calls as it takes.

    `open_call` starts a call, with the metadata it is given, that goes on after what its owner has
    received so far; it is called again after each loss. `silence` is after how many seconds without
    a message a call counts as lost, `max_silence` after how many the whole stream does; None:
    never. `on_lost` is told of every loss that is going to be repaired.
    """

    def __init__(
        self,
        wire: Wire,
        open_call: Callable[[Metadata], grpc.aio.UnaryStreamCall[Any, ResponseT]],
        *,
        silence: float | None = None,
        max_silence: float | None = None,
        on_lost: Callable[[RunlaneError], None] | None = None,
    ) -> None:
        self._wire = wire
        self._open_call = open_call
        self._silence = silence
        self._max_silence = max_silence
        self._on_lost = on_lost
        self._backoff = Backoff(wire.retry)
        self._call: grpc.aio.UnaryStreamCall[Any, ResponseT] | None = None
        self._sent: Metadata = ()
        self._messages = 0
        self._heard_at: float | None = None
        self._renewed_at: float | None = None

    def drop(self) -> None:
        """Ends the call at hand, if there is one; the next `read` opens another."""
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    async def read(self) -> ResponseT | None:
        """The next message; None where the server ended the stream well.

        Raises RunlaneError where opening it again would not help, or took longer than max_silence.
        A cancelled `read` loses nothing: the next one opens a call that goes on.
        """
        while True:
            try:
                message = await self._read_once()
            except RunlaneError as error:
                await self.lost(error)
                continue
            self._messages += 1
            self._heard_at = self._now()
            # A server that greets and then breaks off each time must not be asked in a tight loop:
            # only what comes after the first message shows that things go well.
            if self._messages > 1:
                self._backoff.reset()
            return message

    async def lost(self, error: RunlaneError) -> None:
        """Takes the call at hand for lost, and pauses. Raises the error if going on is no use."""
        self.drop()
        pause = self._backoff.next(error)
        left = self._left()
        helps = errors.is_transient(error) or self._renewed(error)
        if not helps or (left is not None and pause >= left):
            raise error
        log.info("stream of %s lost (%s), opening it again", self._wire.target, error)
        if self._on_lost is not None:
            self._on_lost(error)
        await asyncio.sleep(pause)

    async def _read_once(self) -> ResponseT | None:
        if self._heard_at is None:
            self._heard_at = self._now()
        try:
            if self._call is None:
                self._messages = 0
                self._sent = self._wire.metadata
                self._call = self._open_call(self._sent)
            # Cancelling a read cancels its call, which is what a silent one is in for anyway.
            async with asyncio.timeout(self._patience()):
                message = await self._call.read()
        except TimeoutError as exc:
            text = f"no message from {self._wire.target} for too long"
            raise Unavailable(text) from exc
        except (grpc.aio.AioRpcError, grpc.aio.BaseError) as exc:
            raise self._wire.error(exc) from exc
        except asyncio.CancelledError as exc:
            self.drop()
            if cancelled_by_caller():
                raise
            raise self._wire.error(exc) from exc
        if message is grpc.aio.EOF:
            self._call = None
            return None
        return message  # type: ignore[return-value]  # EOF is an object of no type of its own

    def _renewed(self, error: RunlaneError) -> bool:
        """Whether the stream was refused for a token in whose place there is another by now."""
        if not self._wire.renewed(error, self._sent):
            return False
        before, self._renewed_at = self._renewed_at, self._now()
        return before is None or self._renewed_at - before > RENEWAL_SECONDS

    def _patience(self) -> float | None:
        """For how many seconds the next message may be waited for."""
        bounds = [bound for bound in (self._silence, self._left()) if bound is not None]
        return min(bounds, default=None)

    def _left(self) -> float | None:
        """How many seconds of max_silence are left; None where there is no limit."""
        if self._max_silence is None or self._heard_at is None:
            return None
        return self._heard_at + self._max_silence - self._now()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
