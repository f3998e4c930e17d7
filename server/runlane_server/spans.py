"""Spans as the OpenTelemetry SDK exports them. To be imported where the extra `traces` is."""

from __future__ import annotations

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from runlane_server.core.trace import Place
from runlane_server.tracer import ACCEPT, Span

PATH = "/v1/traces"

_NANOSECONDS = 1000
"""In a microsecond."""

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class Spans:
    """Exports spans to a collector.

    `endpoint` is its URL without a path; `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_RESOURCE_ATTRIBUTES`
    and the other variables of the SDK count as everywhere.
    """

    def __init__(self, endpoint: str, version: str) -> None:
        exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + PATH)
        ours = {"service.name": "runlane", "service.version": version}
        self._ids = _Ids()
        self._provider = TracerProvider(
            # Which runs are exported is decided by now.
            sampler=ALWAYS_ON,
            resource=Resource.create(ours).merge(OTELResourceDetector().detect()),
            id_generator=self._ids,
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("runlane", version)

    def export(self, span: Span) -> None:
        """Takes a span to be exported by and by."""
        self._ids.next = span.place
        context = None
        if span.parent:
            parent = SpanContext(
                int(span.place.trace_id, 16),
                int(span.parent, 16),
                is_remote=span.remote_parent,
                trace_flags=_SAMPLED,
            )
            context = set_span_in_context(NonRecordingSpan(parent))
        made = self._tracer.start_span(
            span.name,
            context,
            SpanKind.SERVER if span.name == ACCEPT else SpanKind.INTERNAL,
            span.attributes,
            start_time=span.begin * _NANOSECONDS,
        )
        if span.error:
            made.set_status(StatusCode.ERROR, span.error)
        # Clocks may be set back, and nothing takes less than no time.
        made.end(max(span.begin, span.end) * _NANOSECONDS)

    def close(self) -> None:
        """Sends out what is left; that may take seconds, where the collector does not answer."""
        self._provider.shutdown()


class _Ids(IdGenerator):
    """Gives the next span the ids that it has."""

    def __init__(self) -> None:
        self.next = Place("", "", sampled=True)

    def generate_span_id(self) -> int:
        """Its own."""
        return int(self.next.span_id, 16)

    def generate_trace_id(self) -> int:
        """That of its trace."""
        return int(self.next.trace_id, 16)
