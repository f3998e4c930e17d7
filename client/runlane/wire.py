"""The gRPC channel to a server: calls with deadlines, retries and backoff."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from copy import copy
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
from runlane.metadata import Metadata, MetadataSource
from runlane.rpc_errors import from_rpc
from runlane.targets import is_local
from runlane.v1.agent_service_pb2_grpc import AgentServiceStub
from runlane.v1.run_service_pb2_grpc import RunServiceStub
from runlane.v1.session_service_pb2_grpc import SessionServiceStub
from runlane.v1.webhook_service_pb2_grpc import WebhookServiceStub

if TYPE_CHECKING:
    from runlane.v1.agent_service_pb2_grpc import AgentServiceAsyncStub
    from runlane.v1.run_service_pb2_grpc import RunServiceAsyncStub
    from runlane.v1.session_service_pb2_grpc import SessionServiceAsyncStub
    from runlane.v1.webhook_service_pb2_grpc import WebhookServiceAsyncStub

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # Detect a dead peer: ping after 20 s of silence and wait 5 s for the reply. `ping_timeout_ms`
    # limits that wait; `keepalive_timeout_ms` alone does not. The minimum time between pings must
    # not delay them.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.min_time_between_pings_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # The channel's own backoff between connection attempts. Its default grows to two minutes, for
    # which a restarted server would still seem to be down.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Clients in one process do not share a connection, so one cannot block another.
    ("grpc.use_local_subchannel_pool", 1),
)
"""Options of every channel; `Client(options=...)` extends and overrides them."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Retries with exponential backoff.

    With the defaults, retries last as long as the client's timeout, so that calls survive a server
    restart within that time.

    Attributes:
        attempts: Maximum number of attempts of a unary call, including the first; 1 or more.
            Streams reconnect without limit.
        initial: Backoff before the first retry, in seconds.
        multiplier: Factor between one backoff and the next.
        maximum: Maximum backoff in seconds. A longer delay requested by the server is respected.

    Each backoff is reduced by a random part of up to half, so that the clients of a restarted
    server do not all return at the same time.
    """

    attempts: int = 12
    initial: float = 0.1
    multiplier: float = 2.0
    maximum: float = 2.0


class Backoff:
    """The delays between attempts under a `RetryPolicy`."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._pause = policy.initial

    def next(self, error: RunlaneError | None = None) -> float:
        """Returns the next delay in seconds, at least the `retry_after` of `error`."""
        pause = min(self._pause, self._policy.maximum)
        self._pause = min(self._pause * self._policy.multiplier, self._policy.maximum)
        pause *= random.uniform(0.5, 1.0)  # noqa: S311 - for load spreading, not for security
        if error is None or error.retry_after is None:
            return pause
        return max(pause, error.retry_after.total_seconds())

    def reset(self) -> None:
        """Resets the delay to the initial one."""
        self._pause = self._policy.initial


def is_cancelled_by_caller() -> bool:
    """Returns True if the current CancelledError is due to a cancel of this task.

    grpc.aio also raises CancelledError if the server returns CANCELLED or the channel is closed.
    """
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


class Wire:
    """A channel, created on first use because it belongs to the event loop that uses it."""

    def __init__(
        self,
        target: str,
        *,
        credentials: grpc.ChannelCredentials | None,
        metadata: MetadataSource,
        options: Sequence[tuple[str, Any]],
        timeout: float,
        retry: RetryPolicy,
    ) -> None:
        self.target = target
        self.timeout = timeout
        self.retry = retry
        self._metadata = metadata
        self._credentials = credentials
        own: dict[str, Any] = dict(CHANNEL_OPTIONS)
        if target.startswith("unix") and credentials is not None:
            # No certificate contains a socket path.
            own["grpc.default_authority"] = "localhost"
        if is_local(target):
            # A proxy from the environment may be on another machine.
            own["grpc.enable_http_proxy"] = 0
        self._options = tuple({**own, **dict(options)}.items())
        self._channel: grpc.aio.Channel | None = None
        self._runs: RunServiceAsyncStub | None = None
        self._sessions: SessionServiceAsyncStub | None = None
        self._agents: AgentServiceAsyncStub | None = None
        self._webhooks: WebhookServiceAsyncStub | None = None
        self._closed = False

    @property
    def metadata(self) -> Metadata:
        """The metadata for the next call."""
        return self._metadata.current()

    def with_token(self, token: Callable[[], str]) -> Wire:
        """Returns a wire with the same channel, whose calls carry another token.

        Close the original only. Raises ClientClosed.
        """
        self.runs  # noqa: B018 - creates the channel, which the copy must share
        view = copy(self)
        view._metadata = MetadataSource({}, token)  # noqa: SLF001 - a copy of this
        return view

    def apart(self) -> Wire:
        """Returns a wire to the same server with a channel of its own; close both."""
        other = copy(self)
        other._channel = other._runs = other._sessions = None  # noqa: SLF001
        other._agents = other._webhooks = None  # noqa: SLF001
        return other

    def has_new_token(self, error: RunlaneError, sent: Metadata) -> bool:
        """Returns True if the call was not authenticated and the token has changed since."""
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

    @property
    def webhooks(self) -> WebhookServiceAsyncStub:
        """The calls of WebhookService. Raises ClientClosed."""
        channel = self.channel
        if self._webhooks is None:
            self._webhooks = WebhookServiceStub(channel)
        return self._webhooks

    @property
    def agents(self) -> AgentServiceAsyncStub:
        """The calls of AgentService. Raises ClientClosed."""
        channel = self.channel
        if self._agents is None:
            self._agents = AgentServiceStub(channel)
        return self._agents

    async def close(self) -> None:
        """Closes the channel; pending calls raise ClientClosed. Idempotent."""
        self._closed = True
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    def error(self, exc: BaseException) -> RunlaneError:
        """Converts an exception of grpc.aio; not for a CancelledError caused by the caller."""
        if self._closed:
            return ClientClosed()
        if isinstance(exc, grpc.aio.AioRpcError):
            return from_rpc(exc, self.target)
        if isinstance(exc, asyncio.CancelledError):
            return UnexpectedStatus(
                f"{self.target} cancelled the call", status=grpc.StatusCode.CANCELLED
            )
        return Unavailable(f"the call to {self.target} failed: {exc}")

    async def once(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT],
        request: RequestT,
        timeout: float,
        metadata: Metadata,
    ) -> ResponseT:
        """Makes one attempt of a call; `timeout` in seconds. Raises RunlaneError."""
        try:
            return await method(request, timeout=max(timeout, 0.0), metadata=metadata)
        except (grpc.aio.AioRpcError, grpc.aio.BaseError) as exc:
            raise self.error(exc) from exc
        except asyncio.CancelledError as exc:
            if is_cancelled_by_caller():
                raise
            raise self.error(exc) from exc

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT],
        request: RequestT,
        *,
        timeout: float | None = None,
        should_retry: Callable[[RunlaneError], bool] = errors.is_transient,
        extra_metadata: Metadata = (),
    ) -> ResponseT:
        """Makes a call with retries. Raises RunlaneError with the number of `attempts`.

        Args:
            method: The method of a stub.
            request: The request message.
            timeout: Seconds for all attempts and the backoff between them; None: the client's.
            should_retry: Decides whether an error is retried. A call rejected as unauthenticated is
                also retried once if the token has changed.
            extra_metadata: Sent in addition to the metadata of every call.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + (self.timeout if timeout is None else timeout)
        backoff = Backoff(self.retry)
        attempts = 0
        token_retried = may_have_arrived = False
        while True:
            attempts += 1
            sent = self.metadata
            try:
                return await self.once(method, request, deadline - clock(), sent + extra_metadata)
            except RunlaneError as error:
                error.attempts = attempts
                unsent = isinstance(error, errors.NotConnected) or errors.is_refused(error)
                error.may_have_arrived = may_have_arrived = may_have_arrived or not unsent
                pause = backoff.next(error)
                is_last = clock() + pause >= deadline or attempts >= self.retry.attempts
                retry_token = not token_retried and self.has_new_token(error, sent)
                token_retried = token_retried or retry_token
                if is_last or not (retry_token or should_retry(error)):
                    raise
            await asyncio.sleep(pause)
