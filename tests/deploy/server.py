"""A server as deploy/ starts it, and what probes are told."""

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
    """A server that serves."""

    process: Process
    address: str

    async def ended(self) -> int:
        """Waits for its end; returns the exit code."""
        async with asyncio.timeout(SECONDS):
            return await self.process.wait()


@asynccontextmanager
async def started(
    folder: Path, flags: Sequence[str], env: Mapping[str, str]
) -> AsyncIterator[Started]:
    """Starts a server in a folder; it is killed at the end if it is still there."""
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
    """What a probe of a service is told; an error if there is none of that name."""
    async with grpc.aio.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=SECONDS)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


async def until_health(address: str, service: str, wanted: str) -> None:
    """Returns when a service is in that state."""
    async with grpc.aio.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        watch = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=SECONDS)
        async for answer in watch:
            if health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) == wanted:
                return
    raise AssertionError(f"{service!r} never was {wanted}")
