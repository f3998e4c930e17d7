"""The health of a server, as a probe reads it."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from support.staging import SECONDS

SERVING = "SERVING"
NOT_SERVING = "NOT_SERVING"


async def health(address: str, service: str) -> str:
    """The health of a service, as a probe gets it. An unknown service is an error."""
    async with grpc.aio.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=SECONDS)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


async def wait_for_health(address: str, service: str, wanted: str) -> None:
    """Waits until the health of a service has that value."""
    async with grpc.aio.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        watch = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=SECONDS)
        async for answer in watch:
            if health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) == wanted:
                return
    raise AssertionError(f"{service!r} never was {wanted}")
