"""The channel to a server, and how one call over it is made, bounded and repeated."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio

from runlane import errors
from runlane.errors import (
    ClientClosed,
    RunlaneError,
    Unauthenticated,
    Unavailable,
    UnexpectedStatus,
)
from runlane.places import is_local
from runlane.statuses import from_rpc
from runlane.tokens import Metadata, Shown
from runlane.v1.run_service_pb2_grpc import RunServiceStub
from runlane.v1.session_service_pb2_grpc import SessionServiceStub

if TYPE_CHECKING:
    from runlane.v1.run_service_pb2_grpc import RunServiceAsyncStub
    from runlane.v1.session_service_pb2_grpc import SessionServiceAsyncStub

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # A peer that is gone without a word is noticed after 20 s of silence and 5 s without an answer
    # to the ping. `keepalive_timeout_ms` alone does not bound that: `ping_timeout_ms` does, and the
    # time between pings must not hold them back.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.min_time_between_pings_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # The channel's own pauses between connection attempts; its default goes up to two minutes,
    # which a server that is back after a restart would seem to be down for.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Two clients of one process do not share a connection, so one of them cannot hold up the other.
    ("grpc.use_local_subchannel_pool", 1),
)
"""How the channel is set up; `Client(options=...)` adds to it and overrides it."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How calls are repeated.

    By default the repetitions last as long as the client's timeout: a server that restarts within
    it is not noticed.

    Attributes:
        attempts: How often a unary call is made at the most, the first time included; 1 or more.
            Streams are resumed without limit.
        initial: The pause before the first repetition, in seconds.
        multiplier: What each pause is multiplied with to get the next.
        maximum: The longest pause, in seconds. A longer one that the server asks for is kept to.

    Each pause is cut by a random part of up to a half, so that the clients of a server that
    restarts do not come back all at once.
    """

    attempts: int = 12
    initial: float = 0.1
    multiplier: float = 2.0
    maximum: float = 2.0


class Backoff:
    """The pauses between one attempt and the next."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._pause = policy.initial

    def next(self, error: RunlaneError | None = None) -> float:
        """The next pause in seconds; never less than the server asked for in `error`."""
        pause = min(self._pause, self._policy.maximum)
        self._pause = min(self._pause * self._policy.multiplier, self._policy.maximum)
        pause *= random.uniform(0.5, 1.0)  # noqa: S311 - it spreads load, it guards nothing
        if error is None or error.retry_after is None:
            return pause
        return max(pause, error.retry_after.total_seconds())

    def reset(self) -> None:
        """Begins with the first pause again."""
        self._pause = self._policy.initial


def cancelled_by_caller() -> bool:
    """Whether the CancelledError at hand is a cancel of this task.

    grpc.aio also raises it where the server answers CANCELLED and where the channel is closed.
    """
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


class Wire:
    """A channel, made on first use, as it belongs to the event loop that uses it."""

    def __init__(
        self,
        target: str,
        *,
        credentials: grpc.ChannelCredentials | None,
        shown: Shown,
        options: Sequence[tuple[str, Any]],
        timeout: float,
        retry: RetryPolicy,
    ) -> None:
        self.target = target
        self.timeout = timeout
        self.retry = retry
        self._shown = shown
        self._credentials = credentials
        own: dict[str, Any] = dict(CHANNEL_OPTIONS)
        if target.startswith("unix") and credentials is not None:
            # A path stands in no certificate.
            own["grpc.default_authority"] = "localhost"
        if is_local(target):
            # A proxy of the environment is on another machine.
            own["grpc.enable_http_proxy"] = 0
        self._options = tuple({**own, **dict(options)}.items())
        self._channel: grpc.aio.Channel | None = None
        self._runs: RunServiceAsyncStub | None = None
        self._sessions: SessionServiceAsyncStub | None = None
        self._closed = False

    @property
    def metadata(self) -> Metadata:
        """What goes with a call that is made now."""
        return self._shown.now()

    def renewed(self, error: RunlaneError, sent: Metadata) -> bool:
        """Whether a call was refused for what was sent with it, and something else is sent now."""
        return isinstance(error, Unauthenticated) and self.metadata != sent

    @property
    def channel(self) -> grpc.aio.Channel:
        """The channel. Raises ClientClosed."""
        if self._closed:
            raise ClientClosed
        if self._channel is None:
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self.target, self._options)
            else:
                self._channel = grpc.aio.secure_channel(
                    self.target, self._credentials, self._options
                )
        return self._channel

    @property
    def runs(self) -> RunServiceAsyncStub:
        """The calls of RunService. Raises ClientClosed."""
        channel = self.channel
        if self._runs is None:
            self._runs = RunServiceStub(channel)
        return self._runs

    @property
    def sessions(self) -> SessionServiceAsyncStub:
        """The calls of SessionService. Raises ClientClosed."""
        channel = self.channel
        if self._sessions is None:
            self._sessions = SessionServiceStub(channel)
        return self._sessions

    async def close(self) -> None:
        """Closes the channel; calls that are under way raise ClientClosed. May be repeated."""
        self._closed = True
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    def error(self, exc: BaseException) -> RunlaneError:
        """What an exception of grpc.aio means; a CancelledError must not be the caller's."""
        if self._closed:
            return ClientClosed()
        if isinstance(exc, grpc.aio.AioRpcError):
            return from_rpc(exc, self.target)
        if isinstance(exc, asyncio.CancelledError):
            return UnexpectedStatus(
                f"{self.target} cancelled the call", status=grpc.StatusCode.CANCELLED
            )
        return Unavailable(f"the call to {self.target} broke: {exc}")

    async def once(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT],
        request: RequestT,
        timeout: float,
        metadata: Metadata,
    ) -> ResponseT:
        """Makes a call once; `timeout` in seconds. Raises RunlaneError."""
        try:
            return await method(request, timeout=max(timeout, 0.0), metadata=metadata)
        except (grpc.aio.AioRpcError, grpc.aio.BaseError) as exc:
            raise self.error(exc) from exc
        except asyncio.CancelledError as exc:
            if cancelled_by_caller():
                raise
            raise self.error(exc) from exc

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT],
        request: RequestT,
        *,
        timeout: float | None = None,
        repeat: Callable[[RunlaneError], bool] = errors.is_transient,
        extra: Metadata = (),
    ) -> ResponseT:
        """Makes a call, and repeats it after errors for which `repeat` holds.

        `extra` is sent along, beside what goes with every call.
        `timeout`, in seconds, bounds all attempts together with the pauses between them; None takes
        the client's. A call that is refused for a token which was renewed meanwhile is repeated
        once. Raises RunlaneError with the number of `attempts`.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + (self.timeout if timeout is None else timeout)
        backoff = Backoff(self.retry)
        attempts = 0
        renewed = False
        while True:
            attempts += 1
            sent = self.metadata
            try:
                return await self.once(method, request, deadline - clock(), sent + extra)
            except RunlaneError as error:
                error.attempts = attempts
                pause = backoff.next(error)
                late = clock() + pause >= deadline or attempts >= self.retry.attempts
                again = not renewed and self.renewed(error, sent)
                renewed = renewed or again
                if late or not (again or repeat(error)):
                    raise
            await asyncio.sleep(pause)
