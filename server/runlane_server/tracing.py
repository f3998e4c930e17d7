"""`--otlp-endpoint`: tells a collector of traces what a node does, by the OpenTelemetry protocol.

The SDK's own exporter does so, in a thread. A collector that is slow or gone costs spans, and never
holds up a run.
"""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog

from runlane_server.core.errors import StartError
from runlane_server.observer import NOBODY, Observer
from runlane_server.release import version_of_server
from runlane_server.tracer import Tracer

log = structlog.get_logger()

OPTION = "--otlp-endpoint"

CLOSE_TIMEOUT = 3.0
"""Seconds that the last spans have to get out when the node stops."""


class Tracing:
    """Exports the spans of a node; does nothing where `endpoint` is None.

    `endpoint` is the URL of a collector, without a path. `ratio` and `content` are those of
    `Tracer`. Raises StartError.
    """

    def __init__(self, endpoint: str | None, *, ratio: float, content: bool) -> None:
        self.observer: Observer = NOBODY
        self._endpoint = endpoint
        self._close: Callable[[], None] | None = None
        if endpoint is None:
            return
        if importlib.util.find_spec("opentelemetry.exporter") is None:
            raise StartError(
                f"{OPTION}: the exporter is not installed; run pip install 'runlane[server,traces]'"
            )
        from runlane_server.spans import Spans  # noqa: PLC0415 - needs an extra

        spans = Spans(endpoint, version_of_server())
        self._close = spans.close
        self.observer = Tracer(
            spans.export, ratio=ratio, now=lambda: time.time_ns() // 1000, content=content
        )

    @asynccontextmanager
    async def exporting(self) -> AsyncIterator[None]:
        """Sends out what is left at the end."""
        if self._close is None:
            yield
            return
        log.info("traces are exported", endpoint=self._endpoint)
        try:
            yield
        finally:
            closing = asyncio.get_running_loop().run_in_executor(None, self._close)
            await asyncio.wait({closing}, timeout=CLOSE_TIMEOUT)
