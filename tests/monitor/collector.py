"""A collector of traces: it takes what is sent by OTLP over HTTP, and keeps it."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass(frozen=True)
class Told:
    """A span as it came."""

    span: Span
    service: str

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
        """The id of the span it is a part of; empty without one."""
        return self.span.parent_span_id.hex()

    @property
    def attributes(self) -> dict[str, str | int]:
        """What it says of itself."""
        return {
            one.key: one.value.string_value or one.value.int_value for one in self.span.attributes
        }


class Collector:
    """What was told so far."""

    def __init__(self) -> None:
        self.spans: list[Told] = []
        self.raw = b""
        self.url = ""

    def named(self, name: str) -> list[Told]:
        """The spans of that name, in the order of their beginnings."""
        found = [one for one in self.spans if one.name == name]
        return sorted(found, key=lambda one: one.span.start_time_unix_nano)

    def one(self, name: str) -> Told:
        """The only span of that name."""
        (found,) = self.named(name)
        return found

    def take(self, body: bytes) -> None:
        """Reads what came."""
        self.raw += body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            about = {one.key: one.value.string_value for one in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [Told(span, about["service.name"]) for span in scope.spans]


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port of the loopback."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            collector.take(body)
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()
