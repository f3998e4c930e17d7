"""A process that executes runs of a server."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import grpc

from runlane.convert import Seconds, seconds
from runlane.metadata import MetadataSource, check_token_target
from runlane.types import NO_LABELS
from runlane.wire import RetryPolicy, Wire
from runlane.worker.slot import Slot
from runlane.worker.threads import AgentFunction

MAX_RECEIVE = (4 << 20) + (64 << 10)
"""A turn may be a little larger than the request that brought its prompt."""

OPTIONS = (
    ("grpc.max_receive_message_length", MAX_RECEIVE),
    # A run is lost after `--worker-lease` (30 s). By then a worker must have noticed that its node
    # fell silent, given up another one that does not answer, and reached the third: 10 and 5 s for
    # the ping, and 5 s for a connection (by default 20 s).
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.http2.min_time_between_pings_ms", 10_000),
    ("grpc.min_reconnect_backoff_ms", 5_000),
)

HAND_BACK_TIMEOUT = 5.0
"""Seconds to hand runs back at the end of `drain_timeout`."""


class Worker:
    """Executes runs of the agents that a server declares as `worker`.

    Args:
        target: The server: `host:port` or any gRPC target; or several nodes of one store, among
            which the slots are spread.
        agents: The functions of the agents, by name; `default` is the agent of a server with one.
        slots: The number of runs that are executed at a time.
        worker_id: The name of this worker in the logs of the server.
        drain_timeout: After SIGTERM, how long active runs may go on before they are handed back
            (seconds or a timedelta).
        credentials: TLS credentials from `grpc.ssl_channel_credentials`; None: plaintext.
        token: The bearer token, or a callable that returns the current one. It needs the role work.
        plaintext_token: Allow sending the token unencrypted to another machine.
        metadata: Sent with every call.
        retry: The backoff between connections.
    """

    def __init__(
        self,
        target: str | Iterable[str],
        agents: Mapping[str, AgentFunction],
        *,
        slots: int = 1,
        worker_id: str = "",
        drain_timeout: Seconds = 10.0,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | Callable[[], str] | None = None,
        plaintext_token: bool = False,
        metadata: Mapping[str, str] = NO_LABELS,
        retry: RetryPolicy | None = None,
    ) -> None:
        self._targets = (target,) if isinstance(target, str) else tuple(target)
        if not self._targets:
            raise ValueError("target: is empty; name a server")
        if not agents:
            raise ValueError("agents: is empty; name the agents that this worker executes")
        if slots < 1:
            raise ValueError(f"slots: is {slots}; the minimum is 1")
        if token is not None and credentials is None and not plaintext_token:
            for one in self._targets:
                check_token_target(one, "set credentials for TLS or plaintext_token=True")
        self._agents = dict(agents)
        self._count = slots
        self._worker_id = worker_id or f"{socket.gethostname()}:{os.getpid()}"
        self._drain_timeout = seconds(drain_timeout)
        self._credentials = credentials
        self._metadata = MetadataSource(metadata, token)
        self._retry = retry or RetryPolicy()
        self._slots: list[Slot] = []
        self._stopping: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._was_stopped = False

    def run(self) -> None:
        """Serves until SIGTERM or SIGINT. Raises what `serve` raises."""
        asyncio.run(self.serve())

    def stop(self) -> None:
        """Makes `serve` return, after the active runs or `drain_timeout`. From any thread."""
        self._was_stopped = True
        if self._loop is not None and self._stopping is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)

    async def serve(self) -> None:
        """Serves until `stop`, or a signal if this is the main thread.

        Raises RunlaneError if the server refuses the worker: an agent that it does not declare, a
        token without the role work, or another version of the protocol.
        """
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        if self._was_stopped:
            return
        wires = [self._wire(target) for target in self._targets]
        undo = self._handle_signals()
        self._slots = [
            Slot(
                [*wires[n % len(wires) :], *wires[: n % len(wires)]], self._agents, self._worker_id
            )
            for n in range(self._count)
        ]
        serving = [asyncio.create_task(slot.serve()) for slot in self._slots]
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            everything: set[asyncio.Task[Any]] = {*serving, stopping}
            await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
            await self._drain(serving)
            for served in serving:
                if served.done() and not served.cancelled() and (error := served.exception()):
                    raise error
        finally:
            undo()
            for task in (*serving, stopping):
                task.cancel()
            await asyncio.wait({*serving, stopping})
            for wire in wires:
                await wire.close()

    async def _drain(self, serving: list[asyncio.Task[None]]) -> None:
        """Lets active runs end, and hands back those that do not."""
        for slot in self._slots:
            slot.stop()
        left = [task for task in serving if not task.done()]
        if left:
            _, pending = await asyncio.wait(left, timeout=self._drain_timeout)
            attempts = [slot.attempt for slot in self._slots if slot.attempt is not None]
            if pending and attempts:
                handing = [asyncio.create_task(attempt.hand_back()) for attempt in attempts]
                await asyncio.wait({*handing, *pending}, timeout=HAND_BACK_TIMEOUT)

    def _wire(self, target: str) -> Wire:
        return Wire(
            target,
            credentials=self._credentials,
            metadata=self._metadata,
            options=OPTIONS,
            timeout=10.0,
            retry=self._retry,
        )

    def _handle_signals(self) -> Callable[[], None]:
        """Handles SIGTERM and SIGINT; returns how to undo that."""
        loop = asyncio.get_running_loop()
        if threading.current_thread() is not threading.main_thread():
            return lambda: None
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)

        def undo() -> None:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

        return undo
