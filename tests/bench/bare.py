"""The upper bound: a grpc.aio server that only answers. Run it as `python -m bench.bare`."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc

from bench import wire
from runlane.v1.run_service_pb2 import RunAcceptedRequest, RunAcceptedResponse

OPTIONS = (("grpc.so_reuseport", 0),)

STREAMED = {
    b"terminal": wire.terminal().SerializeToString(),
    b"delta": wire.delta().SerializeToString(),
}
"""The encoded message of a stream: no server can do less work."""


async def echo(
    request: RunAcceptedRequest, context: grpc.aio.ServicerContext[Any, Any]
) -> RunAcceptedResponse:
    """Answers like RunAccepted."""
    return wire.accepted(request)


async def stream(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Sends the same message until the caller leaves."""
    message = STREAMED[request]
    while True:
        await context.write(message)


async def idle(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Sends one message, and keeps the stream open."""
    await context.write(STREAMED[request])
    await asyncio.Event().wait()


async def collect(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    """Accepts spans and discards them."""
    return b""


HANDLERS = {
    "Echo": grpc.unary_unary_rpc_method_handler(
        echo,
        request_deserializer=RunAcceptedRequest.FromString,
        response_serializer=RunAcceptedResponse.SerializeToString,
    ),
    "Stream": grpc.unary_stream_rpc_method_handler(stream),
    "Idle": grpc.unary_stream_rpc_method_handler(idle),
}

COLLECTOR = "opentelemetry.proto.collector.trace.v1.TraceService"


async def main() -> None:
    """Serves until it is killed."""
    server = grpc.aio.server(options=OPTIONS)
    collector: dict[str, Any] = {"Export": grpc.unary_unary_rpc_method_handler(collect)}
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler("bench.Bare", HANDLERS),
            grpc.method_handlers_generic_handler(COLLECTOR, collector),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"bare listening on 127.0.0.1:{port}\n")
    sys.stdout.flush()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
