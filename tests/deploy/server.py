"""A server started as deploy/ starts it, and its health as probes see it."""

from __future__ import annotations

import asyncio
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from support.rpc_process import PREFIX, PROGRAM, environment

SECONDS = 30.0

SERVING = "SERVING"
NOT_SERVING = "NOT_SERVING"


@dataclass
class Started:
    """A running server."""

    process: Process
    address: str

    async def wait(self) -> int:
        """Waits until it exits; returns the exit code."""
        async with asyncio.timeout(SECONDS):
            return await self.process.wait()


@asynccontextmanager
async def started(
    folder: Path, flags: Sequence[str], env: Mapping[str, str]
) -> AsyncIterator[Started]:
    """Starts a server in a folder; kills it at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        *(*PROGRAM, *flags),
        stdout=PIPE,
        cwd=folder,
        env={**environment(), **env},
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(SECONDS):
            line = (await process.stdout.readline()).decode()
        assert line.startswith(PREFIX)
        yield Started(process, line.removeprefix(PREFIX).strip())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


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
