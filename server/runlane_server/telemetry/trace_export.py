"""`--otlp-endpoint`: connects the `Tracer` of a node with an `OtlpExporter`.

A slow or unavailable collector loses spans but never delays a run.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import structlog

from runlane_server.core.model import Micros
from runlane_server.core.observer import NO_OBSERVER, Observer
from runlane_server.extras import require
from runlane_server.release import version_of_server
from runlane_server.telemetry.tracer import Tracer

if TYPE_CHECKING:
    from runlane_server.telemetry.otlp import OtlpExporter

log = structlog.get_logger()

OPTION = "--otlp-endpoint"

CLOSE_TIMEOUT = 3.0
"""Seconds to send the remaining spans when the node stops."""


class TraceExport:
    """Exports the spans of a node; does nothing if `endpoint` is None.

    `endpoint` is the URL of a collector, without a path. `ratio` and `content` are those of
    `Tracer`. Create it on the event loop. Raises StartError.
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
        self._exporter: OtlpExporter | None = None
        if endpoint is None:
            return
        require("opentelemetry.proto", OPTION)
        from runlane_server.telemetry.otlp import OtlpExporter  # noqa: PLC0415 - needs an extra

        self._exporter = OtlpExporter(endpoint, version_of_server())
        self.observer = Tracer(self._exporter.export, ratio=ratio, now=now, content=content)

    @asynccontextmanager
    async def exporting(self) -> AsyncIterator[None]:
        """Sends the remaining spans when the context ends."""
        if self._exporter is None:
            yield
            return
        log.info("trace export started", endpoint=self._endpoint)
        try:
            yield
        finally:
            await self._exporter.close(CLOSE_TIMEOUT)
