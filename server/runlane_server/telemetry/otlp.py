"""Sends spans to a collector, by OTLP over gRPC. To be imported where the extra `traces` is.

The messages are OpenTelemetry's own. Its SDK makes the same of a span at fourteen times the cost,
most of it for what is not needed here: spans that are open, and are found by whoever runs in them.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

import grpc
import structlog
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceStub
from opentelemetry.proto.common.v1.common_pb2 import InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1 import trace_pb2

from runlane_server.core.errors import StartError
from runlane_server.telemetry.tracer import ACCEPT, Span

log = structlog.get_logger()

INTERVAL = 1.0
"""Seconds that a span waits for others at the most."""

BATCH = 256
"""How many spans go together at the most; it bounds how long making messages of them takes."""

KEPT = 8_192
"""How many are kept while the collector is away; what comes then is lost."""

CALL_TIMEOUT = 5.0
"""Seconds that a call to the collector may take."""

PAUSES = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds between two tries where the collector is away; the last one is repeated."""

_NANOSECONDS = 1000
"""In a microsecond."""

_SERVER = trace_pb2.Span.SPAN_KIND_SERVER
_INTERNAL = trace_pb2.Span.SPAN_KIND_INTERNAL

# Sampled; and whether the parent is of another party, which is known here.
_OF_OURS = 1 | trace_pb2.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
_OF_ANOTHER = _OF_OURS | trace_pb2.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK

_FOR_LATER = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
    }
)
"""How a collector says that the same spans may be sent again."""


class OtlpExporter:
    """Sends spans to a collector, in the order they come in. It belongs to one event loop.

    `endpoint` is the URL of the collector without a path. These variables count, as they do for
    every program that speaks OTLP: `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`,
    `OTEL_EXPORTER_OTLP_HEADERS`, and `OTEL_EXPORTER_OTLP_CERTIFICATE`, the file of the CAs that may
    vouch for a collector of `https`. Raises StartError.
    """

    def __init__(
        self, endpoint: str, version: str, environ: Mapping[str, str] = os.environ
    ) -> None:
        self._resource = Resource(
            attributes=[_set(KeyValue(), *one) for one in _about(version, environ).items()]
        )
        self._scope = InstrumentationScope(name="runlane", version=version)
        self._headers = tuple(_pairs(environ.get("OTEL_EXPORTER_OTLP_HEADERS", "")).items())
        self._channel = _channel(endpoint, environ.get("OTEL_EXPORTER_OTLP_CERTIFICATE", ""))
        self._stub = TraceServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._waiting: deque[Span] = deque()
        self._due = asyncio.Event()
        self._lost = 0
        self._failures = 0
        self._sending = asyncio.create_task(self._send())

    def export(self, span: Span) -> None:
        """Takes a span, to be sent by and by; it is lost if too many wait.

        It becomes a message when it is sent: for many in a row that takes a fraction of the time.
        """
        if len(self._waiting) >= KEPT:
            self._lost += 1
            return
        self._waiting.append(span)
        if len(self._waiting) >= BATCH:
            self._due.set()

    async def close(self, timeout: float) -> None:
        """Sends what is left, for so many seconds at the most."""
        self._sending.cancel()
        await asyncio.wait({self._sending})
        try:
            async with asyncio.timeout(timeout):
                while self._waiting and await self._send_batch():
                    pass
        except TimeoutError:
            pass
        if left := len(self._waiting) + self._lost:
            log.warning("spans were not sent", spans=left)
        await self._channel.close()

    async def _send(self) -> None:
        while True:
            timer = asyncio.get_running_loop().call_later(INTERVAL, self._due.set)
            await self._due.wait()
            timer.cancel()
            self._due.clear()
            while self._waiting and await self._send_batch():
                pass
            if self._failures:
                await asyncio.sleep(PAUSES[min(self._failures, len(PAUSES)) - 1])

    async def _send_batch(self) -> bool:
        """Sends the spans that wait longest; returns whether that is done with."""
        count = min(BATCH, len(self._waiting))
        batch = [_message(span) for span in islice(self._waiting, count)]
        scope = trace_pb2.ScopeSpans(scope=self._scope, spans=batch)
        request = pb.ExportTraceServiceRequest(
            resource_spans=[trace_pb2.ResourceSpans(resource=self._resource, scope_spans=[scope])]
        )
        try:
            await self._stub.Export(request, timeout=CALL_TIMEOUT, metadata=self._headers)
        except grpc.aio.AioRpcError as error:
            if error.code() in _FOR_LATER:
                if not self._failures:
                    log.warning("the collector of traces is away", code=error.code().name)
                self._failures += 1
                return False
            log.warning("the collector refuses spans", code=error.code().name, spans=count)
        else:
            if self._failures:
                log.info("the collector of traces is back", lost=self._lost)
            self._failures = self._lost = 0
        for _ in range(count):
            self._waiting.popleft()
        return True


def _message(span: Span) -> trace_pb2.Span:
    message = trace_pb2.Span(
        trace_id=bytes.fromhex(span.place.trace_id),
        span_id=bytes.fromhex(span.place.span_id),
        parent_span_id=bytes.fromhex(span.parent),
        name=span.name,
        kind=_SERVER if span.name == ACCEPT else _INTERNAL,
        flags=_OF_ANOTHER if span.remote_parent else _OF_OURS,
        start_time_unix_nano=span.begin * _NANOSECONDS,
        # Clocks may be set back, and nothing takes less than no time.
        end_time_unix_nano=max(span.begin, span.end) * _NANOSECONDS,
    )
    for key, value in span.attributes.items():
        # A message that is made elsewhere would be copied here, at twice the cost.
        _set(message.attributes.add(), key, value)
    if span.error:
        message.status.code = trace_pb2.Status.STATUS_CODE_ERROR
        message.status.message = span.error
    return message


def _set(attribute: KeyValue, key: str, value: str | int) -> KeyValue:
    attribute.key = key
    if isinstance(value, int):
        attribute.value.int_value = value
    else:
        attribute.value.string_value = value
    return attribute


def _about(version: str, environ: Mapping[str, str]) -> Mapping[str, str]:
    """What the spans are of. What the operator says goes before."""
    given = _pairs(environ.get("OTEL_RESOURCE_ATTRIBUTES", ""))
    if name := environ.get("OTEL_SERVICE_NAME", ""):
        given["service.name"] = name
    return {"service.name": "runlane", "service.version": version, **given}


def _pairs(text: str) -> dict[str, str]:
    """`key=value,key=value`, with what is special in a value percent-encoded."""
    found = (pair.partition("=") for pair in text.split(",") if "=" in pair)
    return {unquote(key.strip()): unquote(value.strip()) for key, _, value in found}


def _channel(endpoint: str, certificate: str) -> grpc.aio.Channel:
    scheme, _, target = endpoint.partition("://")
    if scheme == "http":
        return grpc.aio.insecure_channel(target)
    try:
        roots = Path(certificate).read_bytes() if certificate else None
    except OSError as error:
        raise StartError(f"OTEL_EXPORTER_OTLP_CERTIFICATE: {error}") from error
    return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(roots))
