"""`--otlp-endpoint`: tells a collector of traces what a node does, by the OpenTelemetry protocol.

A collector that is slow or gone costs spans, and never holds up a run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import structlog

from runlane_server.core.errors import StartError
from runlane_server.core.model import Micros
from runlane_server.core.observer import NO_OBSERVER, Observer
from runlane_server.release import version_of_server
from runlane_server.telemetry.tracer import Tracer

if TYPE_CHECKING:
    from runlane_server.telemetry.otlp import Spans

log = structlog.get_logger()

OPTION = "--otlp-endpoint"

CLOSE_TIMEOUT = 3.0
"""Seconds that the last spans have to get out when the node stops."""


class Tracing:
    """Exports the spans of a node; does nothing where `endpoint` is None.

    `endpoint` is the URL of a collector, without a path. `ratio` and `content` are those of
    `Tracer`. It is made on the event loop. Raises StartError.
    """

    def __init__(
        self,
        endpoint: str | None,
        *,
        ratio: float,
        content: bool,
        now: Callable[[], Micros],
    ) -> None:
        self.observer: Observer = NO_OBSERVER
        self._endpoint = endpoint
        self._spans: Spans | None = None
        if endpoint is None:
            return
        if importlib.util.find_spec("opentelemetry.proto") is None:
            raise StartError(
                f"{OPTION}: opentelemetry-proto is not installed; "
                "run pip install 'runlane[server,traces]'"
            )
        from runlane_server.telemetry.otlp import Spans  # noqa: PLC0415 - needs an extra

        self._spans = Spans(endpoint, version_of_server())
        self.observer = Tracer(self._spans.export, ratio=ratio, now=now, content=content)

    @asynccontextmanager
    async def exporting(self) -> AsyncIterator[None]:
        """Sends out what is left at the end."""
        if self._spans is None:
            yield
            return
        log.info("traces are exported", endpoint=self._endpoint)
        try:
            yield
        finally:
            await self._spans.close(CLOSE_TIMEOUT)
