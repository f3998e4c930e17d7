"""A server stream that reconnects after it was lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import grpc.aio

from runlane import errors
from runlane.errors import RunlaneError, Unavailable
from runlane.metadata import Metadata
from runlane.wire import Backoff, Wire, is_cancelled_by_caller

log = logging.getLogger("runlane")

ResponseT = TypeVar("ResponseT")

TOKEN_RETRY_SECONDS = 5.0
"""Minimum time between two reconnects with a new token; an earlier rejection is final."""


class ResumingStream(Generic[ResponseT]):
    """Reads the messages of a server stream across lost connections.

    Args:
        wire: The channel.
        open_call: Starts a call with the given metadata that continues after the messages received
            so far. Called again after each loss.
        silence: Seconds without a message after which a call counts as lost; None: no limit.
        max_silence: Seconds without a message after which `read` raises; None: no limit.
        on_lost: Called with the error before each reconnect.
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
        self._call_metadata: Metadata = ()
        self._messages_of_call = 0
        self._last_message_at: float | None = None
        self._new_token_at: float | None = None

    def cancel_call(self) -> None:
        """Cancels the current call, if any; the next `read` opens another."""
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    async def read(self) -> ResponseT | None:
        """Returns the next message, or None if the server ended the stream with OK.

        A cancelled `read` loses nothing: the next one opens a call that continues.

        Raises:
            RunlaneError: A reconnect would not help, or took longer than max_silence.
        """
        while True:
            try:
                message = await self._read_once()
            except RunlaneError as error:
                await self.pause_or_raise(error)
                continue
            self._messages_of_call += 1
            self._last_message_at = self._now()
            # The first message of a call does not prove that the connection works: a server that
            # fails right after it must not be called in a tight loop.
            if self._messages_of_call > 1:
                self._backoff.reset()
            return message

    async def pause_or_raise(self, error: RunlaneError) -> None:
        """Cancels the call and waits for the backoff; raises the error if it is permanent."""
        self.cancel_call()
        pause = self._backoff.next(error)
        remaining = self._remaining()
        is_temporary = errors.is_transient(error) or self._can_retry_with_new_token(error)
        if not is_temporary or (remaining is not None and pause >= remaining):
            raise error
        log.info("stream of %s lost (%s), reconnecting", self._wire.target, error)
        if self._on_lost is not None:
            self._on_lost(error)
        await asyncio.sleep(pause)

    async def _read_once(self) -> ResponseT | None:
        if self._last_message_at is None:
            self._last_message_at = self._now()
        try:
            if self._call is None:
                self._messages_of_call = 0
                self._call_metadata = self._wire.metadata
                self._call = self._open_call(self._call_metadata)
            # A timeout cancels the read, which cancels its call; a silent call is lost anyway.
            async with asyncio.timeout(self._read_timeout()):
                message = await self._call.read()
        except TimeoutError as exc:
            text = f"timed out waiting for a message from {self._wire.target}"
            raise Unavailable(text) from exc
        except (grpc.aio.AioRpcError, grpc.aio.BaseError) as exc:
            raise self._wire.error(exc) from exc
        except asyncio.CancelledError as exc:
            self.cancel_call()
            if is_cancelled_by_caller():
                raise
            raise self._wire.error(exc) from exc
        if message is grpc.aio.EOF:
            self._call = None
            return None
        return message  # type: ignore[return-value]  # EOF is an object of no type of its own

    def _can_retry_with_new_token(self, error: RunlaneError) -> bool:
        if not self._wire.has_new_token(error, self._call_metadata):
            return False
        before, self._new_token_at = self._new_token_at, self._now()
        return before is None or self._new_token_at - before > TOKEN_RETRY_SECONDS

    def _read_timeout(self) -> float | None:
        limits = [limit for limit in (self._silence, self._remaining()) if limit is not None]
        return min(limits, default=None)

    def _remaining(self) -> float | None:
        """Returns the seconds left of max_silence; None: no limit."""
        if self._max_silence is None or self._last_message_at is None:
            return None
        return self._last_message_at + self._max_silence - self._now()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
