"""A trace collector that receives OTLP over gRPC and keeps the spans."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass(frozen=True)
class ReceivedSpan:
    """A span and its resource."""

    span: Span
    resource: dict[str, str]

    @property
    def name(self) -> str:
        """Its name."""
        return self.span.name

    @property
    def trace_id(self) -> str:
        """Its trace."""
        return self.span.trace_id.hex()

    @property
    def span_id(self) -> str:
        """Its id."""
        return self.span.span_id.hex()

    @property
    def parent(self) -> str:
        """The id of its parent span; empty without one."""
        return self.span.parent_span_id.hex()

    @property
    def attributes(self) -> dict[str, str | int]:
        """Its attributes."""
        return {
            one.key: one.value.string_value or one.value.int_value for one in self.span.attributes
        }


class Collector(TraceServiceServicer):
    """The spans received so far. While `refusal` is set, every call is answered with it."""

    def __init__(self) -> None:
        self.spans: list[ReceivedSpan] = []
        self.raw = b""
        self.url = ""
        self.metadata: dict[str, Any] = {}
        self.refusal: grpc.StatusCode | None = None

    def named(self, name: str) -> list[ReceivedSpan]:
        """The spans of a name, ordered by start time."""
        found = [one for one in self.spans if one.name == name]
        return sorted(found, key=lambda one: one.span.start_time_unix_nano)

    def one(self, name: str) -> ReceivedSpan:
        """The only span of that name."""
        (found,) = self.named(name)
        return found

    async def Export(  # noqa: N802 - a method is named for its rpc
        self, request: ExportTraceServiceRequest, context: Any
    ) -> ExportTraceServiceResponse:
        """Stores spans."""
        if self.refusal is not None:
            await context.abort(self.refusal, "not now")
        self.metadata = dict(context.invocation_metadata())
        self.raw += request.SerializeToString()
        for resource in request.resource_spans:
            attributes = {one.key: one.value.string_value for one in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [ReceivedSpan(span, attributes) for span in scope.spans]
        return ExportTraceServiceResponse()


@asynccontextmanager
async def collecting(port: int = 0) -> AsyncIterator[Collector]:
    """A collector on a loopback port, by default a free one."""
    collector = Collector()
    server = grpc.aio.server()
    add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    collector.url = f"http://127.0.0.1:{bound}"
    await server.start()
    try:
        yield collector
    finally:
        await server.stop(0)
