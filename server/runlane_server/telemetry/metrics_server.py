"""`--metrics-listen`: serves the metrics of a node over HTTP, for Prometheus.

A scrape takes two steps: the state of the node is read on the event loop, which owns it; then the
page is rendered in a thread, as that takes some milliseconds.
"""

from __future__ import annotations

import asyncio
import os
from asyncio import StreamReader, StreamWriter
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import structlog

from runlane_server.core.errors import StoreUnavailable, start_error
from runlane_server.core.model import Micros
from runlane_server.core.observer import NO_OBSERVER, Observer
from runlane_server.engine.coordinator import Coordinator
from runlane_server.extras import require
from runlane_server.feed.feed import Feed
from runlane_server.harness.clock import SYSTEM_CLOCK, real_loop_time
from runlane_server.net.addresses import Address
from runlane_server.release import version_of_server
from runlane_server.rpc.endpoint import Endpoint
from runlane_server.store.base import Store
from runlane_server.store.vitals import StoreVitals
from runlane_server.webhooks.attempts import Counts

if TYPE_CHECKING:
    from runlane_server.telemetry.metrics import Metrics, NodeState, StoreState

log = structlog.get_logger()

LAG_INTERVAL = 0.25
"""Seconds between two measurements of the event loop's delay."""

REQUEST_TIMEOUT = 5.0
"""Timeout in seconds for a whole request: reading it and writing the response."""

REQUEST_BYTES = 8192
"""Maximum size of a request's head. Prometheus sends less than 1 KiB."""

MEASURE_INTERVAL = 1.0
"""Seconds for which a measurement of the store holds, however often the page is read."""

MEASURE_TIMEOUT = 2.0
"""Timeout in seconds for a measurement. A page without it is better than none."""

MAX_CONNECTIONS = 32
"""Connections at once; further ones are closed. The descriptors are for callers and runs."""

OPTION = "--metrics-listen"


class MetricsServer:
    """Collects and serves the metrics of a node; does nothing if `listen` is None.

    Raises StartError.
    """

    def __init__(
        self,
        listen: Address | None,
        store_kind: str,
        now: Callable[[], Micros] = SYSTEM_CLOCK.micros,
    ) -> None:
        if listen is not None:
            require("prometheus_client", OPTION)
        self.observer: Observer = NO_OBSERVER
        self.webhooks = Counts()
        self._listen = listen
        self._store_kind = store_kind
        self._now = now
        self._metrics: Metrics | None = None
        self._state: NodeState | None = None
        self._rendering = asyncio.Lock()
        self._connections = 0

    def attach(self, store: Store, feed: Feed) -> None:
        """Inserts a `Meter` between an open store and the feed that listens to it."""
        if self._listen is None:
            return
        from runlane_server.telemetry.meter import Meter  # noqa: PLC0415 - needs an extra
        from runlane_server.telemetry.metrics import Metrics  # noqa: PLC0415

        self._metrics = Metrics(self._last_state)
        meter = Meter(self._metrics, feed, self._now)
        store.listener = store.write_observer = self.observer = meter

    @asynccontextmanager
    async def serving(self, coordinator: Coordinator, endpoint: Endpoint) -> AsyncIterator[None]:
        """Serves metrics while the context is open. Raises StartError if it cannot listen."""
        if self._metrics is None or self._listen is None:
            yield
            return
        node = _StateReader(coordinator, endpoint, self._store_kind, self._now, self.webhooks)
        self._state = node.state()
        host, port = self._listen.host, self._listen.port

        async def answer(reader: StreamReader, writer: StreamWriter) -> None:
            if self._connections >= MAX_CONNECTIONS:
                writer.close()
                return
            self._connections += 1
            try:
                await self._answer(node, reader, writer)
            finally:
                self._connections -= 1

        try:
            # The loop accepts up to `backlog` connections before it closes the first.
            server = await asyncio.start_server(
                answer, host, port, limit=REQUEST_BYTES, backlog=MAX_CONNECTIONS
            )
        except OSError as error:
            # asyncio's text is longer than the system's, without saying more.
            number = error.errno or 0
            reason = (os.strerror(number) if number > 0 else str(error)).lower()
            message = f"{OPTION}: cannot listen on {self._listen}: {reason}"
            raise start_error(message, error) from error
        measuring = asyncio.create_task(self._measure_lag(self._metrics))
        bound = self._listen.with_port(server.sockets[0].getsockname()[1])
        log.info("metrics served", url=f"http://{bound}/metrics")
        try:
            yield
        finally:
            measuring.cancel()
            server.close()

    def _last_state(self) -> NodeState:
        assert self._state is not None  # noqa: S101 - set before the first scrape
        return self._state

    async def _measure_lag(self, metrics: Metrics) -> None:
        """Measures the delay of the event loop: how long callbacks block it."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_INTERVAL
            await asyncio.sleep(LAG_INTERVAL)
            metrics.loop_lag.observe(max(0.0, loop.time() - due))

    async def _answer(self, node: _StateReader, reader: StreamReader, writer: StreamWriter) -> None:
        """Serves one request per connection; ignores peers that are slow or gone."""
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(await self._response(node, head))
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _response(self, node: _StateReader, head: bytes) -> bytes:
        method, _, rest = head.partition(b" ")
        path = rest.split(b" ", 1)[0].partition(b"?")[0]
        if method not in {b"GET", b"HEAD"}:
            return _http("405 Method Not Allowed", b"only GET and HEAD are allowed\n")
        if path != b"/metrics":
            return _http("404 Not Found", b"not found; metrics are at /metrics\n")
        body, kind = await self._page(node)
        return _http("200 OK", body, kind, headers_only=method == b"HEAD")

    async def _page(self, node: _StateReader) -> tuple[bytes, str]:
        from prometheus_client import (  # noqa: PLC0415 - an extra
            CONTENT_TYPE_LATEST,
            generate_latest,
        )

        assert self._metrics is not None  # noqa: S101 - it is served
        # One at a time, so that each page has the state of one moment.
        async with self._rendering:
            await node.measure()
            self._state = node.state()
            page = await asyncio.to_thread(generate_latest, self._metrics.registry)
        return page, CONTENT_TYPE_LATEST


class _StateReader:
    """Reads the state of a node."""

    def __init__(
        self,
        coordinator: Coordinator,
        endpoint: Endpoint,
        store_kind: str,
        now: Callable[[], Micros],
        webhooks: Counts,
    ) -> None:
        self._webhooks = webhooks
        self._coordinator = coordinator
        self._endpoint = endpoint
        self._store_kind = store_kind
        self._now = now
        self._version = version_of_server()
        self._vitals: StoreVitals | None = None
        self._measured_at = float("-inf")

    async def measure(self) -> None:
        """Measures the store, unless it was measured just now."""
        now = real_loop_time()
        if now - self._measured_at < MEASURE_INTERVAL:
            return
        try:
            async with asyncio.timeout(MEASURE_TIMEOUT):
                self._vitals = await self._coordinator.store.vitals()
        except (StoreUnavailable, TimeoutError):
            self._vitals = None
        self._measured_at = real_loop_time()

    def _measured(self) -> StoreState:
        from runlane_server.telemetry.metrics import StoreState  # noqa: PLC0415 - needs an extra

        if (vitals := self._vitals) is None:
            return StoreState()
        return StoreState(
            size=vitals.size,
            free=vitals.free,
            oldest_waiting_run=self._age(vitals.waiting_since),
            oldest_input_request=self._age(vitals.asking_since),
        )

    def _age(self, since: Micros | None) -> float:
        return 0.0 if since is None else max(0.0, (self._now() - since) / 1e6)

    def state(self) -> NodeState:
        """The current state. Call it on the event loop."""
        from runlane_server.telemetry.metrics import NodeState  # noqa: PLC0415 - needs an extra

        coordinator, hooks = self._coordinator, self._webhooks
        load, feed, member = coordinator.load, coordinator.feed, coordinator.membership
        state = NodeState(
            version=self._version,
            store=self._store_kind,
            node_id="" if member is None else member.node_id,
            runs_active=load.active_by_agent,
            runs_waiting=load.waiting,
            slots_in_use=load.slots_in_use,
            slots_limit=coordinator.limits.max_active_runs,
            agent_ready={
                agent.name: agent.is_ready for agent in coordinator.agents if agent.slots_limit != 0
            },
            draining=load.draining,
            subscriptions={
                "run_complete": feed.subscriptions - feed.followers,
                "run": feed.followers,
            },
            subscription_behind=feed.furthest_behind,
            log_behind=coordinator.store.behind,
            rpcs_open=Counter(self._endpoint.calls.methods),
            measured=self._measured(),
            webhooks={"arrived": hooks.delivered, "failed": hooks.failed},
            webhook_problems={
                "disabled": hooks.disabled,
                "given_up": hooks.given_up,
                "compacted": hooks.lost,
                "locked": hooks.locked,
            },
        )
        if coordinator.workers is not None:
            quarantine = coordinator.workers.quarantine
            state = state._replace(
                workers_quarantined=quarantine.barred, worker_quarantines=quarantine.started
            )
        if member is None:
            return state
        return state._replace(lease=member.lease, beat_age=member.heartbeat_age, alive=member.alive)


def _http(
    status: str, body: bytes, kind: str = "text/plain; charset=utf-8", *, headers_only: bool = False
) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + (b"" if headers_only else body)
