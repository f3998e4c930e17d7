"""What a connection may take: calls at a time, headers, and time to say something."""

from __future__ import annotations

import asyncio
import struct

import grpc
import pytest

from rpc.wire import serving
from runlane.v1 import run_service_pb2 as pb
from runlane_server.rpc import endpoint as endpoint_module
from runlane_server.rpc.endpoint import MAX_CALLS, MAX_METADATA, OPTIONS

SECONDS = 20.0

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
NO_SETTINGS = struct.pack(">IBI", 4, 0, 0)
"""A SETTINGS frame without any; its length, 0, is the first three of these bytes."""

SETTINGS, MAX_CONCURRENT_STREAMS = 4, 3


async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def settings_of(address: str) -> dict[int, int]:
    """What the server tells a client first."""
    reader, writer = await connect(address)
    writer.write(PREFACE + NO_SETTINGS)
    async with asyncio.timeout(SECONDS):
        while True:
            head = await reader.readexactly(9)
            body = await reader.readexactly(int.from_bytes(head[:3], "big"))
            if head[3] == SETTINGS and body:
                writer.close()
                return dict(struct.iter_unpack(">HI", body))


async def test_a_connection_has_so_many_calls_at_a_time() -> None:
    async with serving() as wire:
        assert (await settings_of(wire.address))[MAX_CONCURRENT_STREAMS] == MAX_CALLS


async def test_metadata_may_be_large_and_not_larger() -> None:
    """Tokens of others are several KiB."""
    async with serving() as wire:

        async def answer(size: int) -> grpc.StatusCode:
            try:
                await wire.runs.GetRun(
                    pb.GetRunRequest(run_id="x"), metadata=(("authorization", "x" * size),)
                )
            except grpc.aio.AioRpcError as error:
                return error.code()
            raise AssertionError("there is no such run")

        assert await answer(MAX_METADATA - 2_048) is grpc.StatusCode.NOT_FOUND
        assert await answer(2 * MAX_METADATA) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await answer(0) is grpc.StatusCode.NOT_FOUND


async def test_who_connects_and_says_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "grpc.server_handshake_timeout_ms"
    assert 1_000 <= dict(OPTIONS)[name] <= 30_000
    hurried = tuple((key, 300 if key == name else value) for key, value in OPTIONS)
    monkeypatch.setattr(endpoint_module, "OPTIONS", hurried)
    async with serving() as wire:
        reader, writer = await connect(wire.address)
        async with asyncio.timeout(SECONDS):
            while await reader.read(1024):
                pass
        writer.close()
