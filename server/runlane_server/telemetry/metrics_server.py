"""`--metrics-listen`: what an operator sees of a node, for Prometheus to scrape.

A scrape takes two steps. What the node is at the moment is looked up on the event loop, as it
belongs there; the page is written in a thread, which takes some milliseconds.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
from asyncio import StreamReader, StreamWriter
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import structlog

from runlane_server.core.errors import StartError
from runlane_server.core.model import Micros
from runlane_server.core.observer import NO_OBSERVER, Observer
from runlane_server.engine.coordinator import Coordinator
from runlane_server.feed.feed import Feed
from runlane_server.harness.clock import SYSTEM
from runlane_server.net.addresses import of_worker, split_address
from runlane_server.release import version_of_server
from runlane_server.rpc.endpoint import Endpoint
from runlane_server.store.base import Store

if TYPE_CHECKING:
    from runlane_server.telemetry.metrics import Metrics, NodeState

log = structlog.get_logger()

LOOP_PAUSE = 0.25
"""Seconds between two looks at how late the event loop comes round."""

REQUEST_TIMEOUT = 5.0
"""Seconds that somebody has to say what he wants, and to take it."""

REQUEST_BYTES = 8192
"""How long that may be. A scraper says less than 1 KiB."""

OPTION = "--metrics-listen"


class Monitor:
    """Watches a node and serves its metrics; does nothing where `listen` is None.

    `listen` is HOST:PORT; the worker of a number takes the port that is so much higher.
    """

    def __init__(
        self,
        listen: str | None,
        store_kind: str,
        worker: int | None = None,
        now: Callable[[], Micros] = SYSTEM.micros,
    ) -> None:
        if listen is not None and importlib.util.find_spec("prometheus_client") is None:
            raise StartError(
                f"{OPTION}: prometheus_client is not installed; "
                "run pip install 'runlane[server,metrics]'"
            )
        self.observer: Observer = NO_OBSERVER
        self._listen = of_worker(listen, worker, OPTION) if listen and worker else listen
        self._store_kind = store_kind
        self._now = now
        self._metrics: Metrics | None = None
        self._state: NodeState | None = None
        self._writing = asyncio.Lock()

    def watch(self, store: Store, feed: Feed) -> None:
        """Steps in between a store that is open and the feed that listens to it."""
        if self._listen is None:
            return
        from runlane_server.telemetry.meter import Meter  # noqa: PLC0415 - needs an extra
        from runlane_server.telemetry.metrics import Metrics  # noqa: PLC0415

        self._metrics = Metrics(self._last_state)
        meter = Meter(self._metrics, feed, self._now)
        store.listener = store.write_observer = self.observer = meter

    @asynccontextmanager
    async def serving(self, coordinator: Coordinator, endpoint: Endpoint) -> AsyncIterator[None]:
        """Serves the metrics of a node meanwhile. Raises StartError if it cannot listen."""
        if self._metrics is None or self._listen is None:
            yield
            return
        node = _Node(coordinator, endpoint, self._store_kind)
        self._state = node.state()
        host, port = split_address(self._listen)

        async def answer(reader: StreamReader, writer: StreamWriter) -> None:
            await self._answer(node, reader, writer)

        try:
            server = await asyncio.start_server(answer, host.strip("[]"), port, limit=REQUEST_BYTES)
        except OSError as error:
            # asyncio's own text is longer than that of the system, and says no more.
            code = error.errno or 0
            why = (os.strerror(code) if code > 0 else str(error)).lower()
            raise StartError(f"{OPTION}: cannot listen on {self._listen}: {why}") from error
        ticking = asyncio.create_task(self._tick(self._metrics))
        bound = server.sockets[0].getsockname()[1]
        log.info("metrics are served", url=f"http://{host}:{bound}/metrics")
        try:
            yield
        finally:
            ticking.cancel()
            server.close()

    def _last_state(self) -> NodeState:
        assert self._state is not None  # noqa: S101 - it is there before anybody can ask
        return self._state

    async def _tick(self, metrics: Metrics) -> None:
        """Notes how late the event loop comes round: how long others keep it busy at a stretch."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LOOP_PAUSE
            await asyncio.sleep(LOOP_PAUSE)
            metrics.loop_lag.observe(max(0.0, loop.time() - due))

    async def _answer(self, node: _Node, reader: StreamReader, writer: StreamWriter) -> None:
        """One request on a connection. Who dawdles, or is gone, is left."""
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

    async def _response(self, node: _Node, head: bytes) -> bytes:
        method, _, rest = head.partition(b" ")
        path = rest.split(b" ", 1)[0].partition(b"?")[0]
        if method not in {b"GET", b"HEAD"}:
            return _http("405 Method Not Allowed", b"GET it\n")
        if path != b"/metrics":
            return _http("404 Not Found", b"it is at /metrics\n")
        body, kind = await self._page(node)
        return _http("200 OK", body, kind, headers_only=method == b"HEAD")

    async def _page(self, node: _Node) -> tuple[bytes, str]:
        from prometheus_client import (  # noqa: PLC0415 - an extra
            CONTENT_TYPE_LATEST,
            generate_latest,
        )

        assert self._metrics is not None  # noqa: S101 - it is served
        # One after another: each has the state of its own moment.
        async with self._writing:
            self._state = node.state()
            page = await asyncio.to_thread(generate_latest, self._metrics.registry)
        return page, CONTENT_TYPE_LATEST


class _Node:
    """Where the state of a node is looked up."""

    def __init__(self, coordinator: Coordinator, endpoint: Endpoint, store_kind: str) -> None:
        self._coordinator = coordinator
        self._endpoint = endpoint
        self._store_kind = store_kind
        self._version = version_of_server()

    def state(self) -> NodeState:
        """As it is now. Belongs to the event loop."""
        from runlane_server.telemetry.metrics import NodeState  # noqa: PLC0415 - needs an extra

        coordinator = self._coordinator
        load, feed, member = coordinator.load, coordinator.feed, coordinator.membership
        state = NodeState(
            version=self._version,
            store=self._store_kind,
            node_id="" if member is None else member.node_id,
            runs_active=load.active,
            runs_waiting=load.waiting,
            slots_in_use=load.slots_in_use,
            slots_limit=coordinator.limits.max_active_runs,
            agent_ready=coordinator.is_agent_ready,
            draining=load.draining,
            subscriptions={
                "run_complete": feed.subscriptions - feed.followers,
                "run": feed.followers,
            },
            subscription_behind=feed.furthest_behind,
            log_behind=coordinator.store.behind,
            rpcs_open=Counter(self._endpoint.calls.methods),
        )
        if member is None:
            return state
        return state._replace(lease=member.lease, beat_age=member.beat_age, alive=member.alive)


def _http(
    status: str, body: bytes, kind: str = "text/plain; charset=utf-8", *, headers_only: bool = False
) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + (b"" if headers_only else body)
