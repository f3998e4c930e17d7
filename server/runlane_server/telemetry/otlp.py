"""Exports spans to a collector, by OTLP over gRPC. Needs the extra `traces`.

The messages are OpenTelemetry's own; the exporter is ours for a measured reason: with the
OpenTelemetry SDK a span costs fourteen times as much, mostly for features that are not used here
(open spans, and finding the current span by context).
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

from runlane_server.core.errors import start_error
from runlane_server.telemetry.tracer import ACCEPT, Span

log = structlog.get_logger()

INTERVAL = 1.0
"""Maximum time in seconds that a span waits for its batch to fill."""

BATCH_SIZE = 256
"""Maximum number of spans per request. It bounds how long encoding them blocks the event loop."""

QUEUE_SIZE = 8_192
"""Maximum number of spans that wait to be sent; further spans are dropped."""

CALL_TIMEOUT = 5.0
"""Timeout in seconds of a call to the collector."""

BACKOFF = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds between retries while the collector is unavailable; the last value repeats."""

_NANOSECONDS_PER_MICROSECOND = 1000

_SERVER = trace_pb2.Span.SPAN_KIND_SERVER
_INTERNAL = trace_pb2.Span.SPAN_KIND_INTERNAL

# Flags of a span: sampled, and whether its parent is remote.
_LOCAL_PARENT = 1 | trace_pb2.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
_REMOTE_PARENT = _LOCAL_PARENT | trace_pb2.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK

_RETRYABLE = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
    }
)
"""Status codes after which the same spans may be sent again."""


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
            attributes=[
                _set(KeyValue(), *one) for one in _resource_attributes(version, environ).items()
            ]
        )
        self._scope = InstrumentationScope(name="runlane", version=version)
        self._headers = tuple(_pairs(environ.get("OTEL_EXPORTER_OTLP_HEADERS", "")).items())
        self._channel = _channel(endpoint, environ.get("OTEL_EXPORTER_OTLP_CERTIFICATE", ""))
        self._stub = TraceServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._queue: deque[Span] = deque()
        self._due = asyncio.Event()
        self._dropped = 0
        self._failures = 0
        self._sender = asyncio.create_task(self._send())

    def export(self, span: Span) -> None:
        """Queues a span; drops it if the queue is full.

        Spans are encoded when they are sent: encoding many in a row takes a fraction of the time.
        """
        if len(self._queue) >= QUEUE_SIZE:
            self._dropped += 1
            return
        self._queue.append(span)
        if len(self._queue) >= BATCH_SIZE:
            self._due.set()

    async def close(self, timeout: float) -> None:
        """Sends the remaining spans for at most `timeout` seconds, then closes the connection."""
        self._sender.cancel()
        await asyncio.wait({self._sender})
        try:
            async with asyncio.timeout(timeout):
                while self._queue and await self._send_batch():
                    pass
        except TimeoutError:
            pass
        if lost := len(self._queue) + self._dropped:
            log.warning("spans not exported", spans=lost)
        await self._channel.close()

    async def _send(self) -> None:
        while True:
            timer = asyncio.get_running_loop().call_later(INTERVAL, self._due.set)
            await self._due.wait()
            timer.cancel()
            self._due.clear()
            while self._queue and await self._send_batch():
                pass
            if self._failures:
                await asyncio.sleep(BACKOFF[min(self._failures, len(BACKOFF)) - 1])

    async def _send_batch(self) -> bool:
        """Sends the oldest spans; returns False if they must be sent again."""
        count = min(BATCH_SIZE, len(self._queue))
        batch = [_encode(span) for span in islice(self._queue, count)]
        scope = trace_pb2.ScopeSpans(scope=self._scope, spans=batch)
        request = pb.ExportTraceServiceRequest(
            resource_spans=[trace_pb2.ResourceSpans(resource=self._resource, scope_spans=[scope])]
        )
        try:
            await self._stub.Export(request, timeout=CALL_TIMEOUT, metadata=self._headers)
        except grpc.aio.AioRpcError as error:
            if error.code() in _RETRYABLE:
                if not self._failures:
                    log.warning("trace collector unavailable", code=error.code().name)
                self._failures += 1
                return False
            log.warning(
                "spans rejected by the trace collector", code=error.code().name, spans=count
            )
        else:
            if self._failures:
                log.info("trace collector available again", dropped=self._dropped)
            self._failures = self._dropped = 0
        for _ in range(count):
            self._queue.popleft()
        return True


def _encode(span: Span) -> trace_pb2.Span:
    encoded = trace_pb2.Span(
        trace_id=bytes.fromhex(span.place.trace_id),
        span_id=bytes.fromhex(span.place.span_id),
        parent_span_id=bytes.fromhex(span.parent),
        name=span.name,
        kind=_SERVER if span.name == ACCEPT else _INTERNAL,
        flags=_REMOTE_PARENT if span.remote_parent else _LOCAL_PARENT,
        start_time_unix_nano=span.begin * _NANOSECONDS_PER_MICROSECOND,
        # A clock may be set back; a duration is never negative.
        end_time_unix_nano=max(span.begin, span.end) * _NANOSECONDS_PER_MICROSECOND,
    )
    for key, value in span.attributes.items():
        # Filled in place: appending a finished message would copy it, at twice the cost.
        _set(encoded.attributes.add(), key, value)
    if span.error:
        encoded.status.code = trace_pb2.Status.STATUS_CODE_ERROR
        encoded.status.message = span.error
    return encoded


def _set(attribute: KeyValue, key: str, value: str | int) -> KeyValue:
    attribute.key = key
    if isinstance(value, int):
        attribute.value.int_value = value
    else:
        attribute.value.string_value = value
    return attribute


def _resource_attributes(version: str, environ: Mapping[str, str]) -> Mapping[str, str]:
    """The resource of all spans. The operator's attributes override the defaults."""
    given = _pairs(environ.get("OTEL_RESOURCE_ATTRIBUTES", ""))
    if name := environ.get("OTEL_SERVICE_NAME", ""):
        given["service.name"] = name
    return {"service.name": "runlane", "service.version": version, **given}


def _pairs(text: str) -> dict[str, str]:
    """Parses `key=value,key=value`; special characters are percent-encoded."""
    pairs = (pair.partition("=") for pair in text.split(",") if "=" in pair)
    return {unquote(key.strip()): unquote(value.strip()) for key, _, value in pairs}


def _channel(endpoint: str, certificate: str) -> grpc.aio.Channel:
    scheme, _, target = endpoint.partition("://")
    if scheme == "http":
        return grpc.aio.insecure_channel(target)
    try:
        roots = Path(certificate).read_bytes() if certificate else None
    except OSError as error:
        raise start_error(f"OTEL_EXPORTER_OTLP_CERTIFICATE: {error}", error) from error
    return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(roots))
