"""Limits of a connection: concurrent calls, metadata, and time for the handshake."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import struct
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from proofs.fuzz.regressions import NOT_UTF8_PATH
from runlane import Client, RunState
from runlane.v1 import run_service_pb2 as pb
from runlane.v1 import run_service_pb2_grpc
from runlane_server.rpc import endpoint as endpoint_module
from runlane_server.rpc.endpoint import MAX_CALLS, MAX_METADATA, OPTIONS
from runlane_server.rpc.requests import WINDOW
from support import server as processes
from support.raw_http2 import INITIAL_WINDOW, raw_connection
from support.rpc_wire import refused, serving
from support.staging import script
from support.wire import Wire

SECONDS = 20.0

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
NO_SETTINGS = struct.pack(">IBI", 4, 0, 0)
"""An empty SETTINGS frame; the first three of these bytes are its length, 0."""

SETTINGS, MAX_CONCURRENT_STREAMS = 4, 3


async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def settings_of(address: str) -> dict[int, int]:
    """Returns the settings that the server sends first."""
    reader, writer = await connect(address)
    writer.write(PREFACE + NO_SETTINGS)
    async with asyncio.timeout(SECONDS):
        while True:
            head = await reader.readexactly(9)
            body = await reader.readexactly(int.from_bytes(head[:3], "big"))
            if head[3] == SETTINGS and body:
                writer.close()
                return dict(struct.iter_unpack(">HI", body))


async def test_concurrent_calls_per_connection_are_limited() -> None:
    async with serving() as wire:
        assert (await settings_of(wire.address))[MAX_CONCURRENT_STREAMS] == MAX_CALLS


async def test_little_of_a_message_is_taken_in_before_it_is_read() -> None:
    async with serving() as wire:
        assert (await settings_of(wire.address))[INITIAL_WINDOW] <= WINDOW


async def test_metadata_is_accepted_up_to_its_limit() -> None:
    """Tokens of other issuers have several KiB."""
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


async def test_a_silent_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_connections_leave_half_of_the_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))
    try:
        assert endpoint_module.max_connections(1) == 300
        assert endpoint_module.max_connections(2) == 150
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_connections_beyond_the_limit_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "max_connections", lambda listeners: 3)
    async with serving() as wire, AsyncExitStack() as opened, asyncio.timeout(SECONDS):
        await refused(wire.runs.GetRun(pb.GetRunRequest(run_id="r")))
        inside = [await opened.enter_async_context(raw_connection(wire.address)) for _ in range(2)]
        for raw in inside:
            await raw.until_ended(raw.open("/x"))
        beyond = await opened.enter_async_context(raw_connection(wire.address))
        with pytest.raises(ConnectionError):
            await beyond.until_ended(beyond.open("/x"))
        # The open ones are served.
        for raw in inside:
            await raw.until_ended(raw.open("/x"))


async def test_an_idle_connection_is_closed_and_an_active_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "grpc.max_connection_idle_ms"
    assert 10_000 <= dict(OPTIONS)[name] <= 300_000
    hurried = tuple((key, 500 if key == name else value) for key, value in OPTIONS)
    monkeypatch.setattr(endpoint_module, "OPTIONS", hurried)
    async with serving() as wire, asyncio.timeout(SECONDS):
        stream: Any = wire.runs.SubscribeRunComplete(pb.SubscribeRunCompleteRequest())
        assert (await stream.read()).HasField("progress")
        async with raw_connection(wire.address) as raw:
            with pytest.raises(ConnectionError):
                await raw.until_ended(99)
        run = pb.RunAcceptedRequest(
            session_id="s", prompt=script({"text": "x"}), allow_missing=True
        )
        accepted = await wire.runs.RunAccepted(run)
        assert (await stream.read()).run_complete.run_id == accepted.run.run_id
        stream.cancel()


# --- A path that is not UTF-8 ---------------------------------------------------------------------


async def call_strange_path(address: str) -> None:
    """Calls a method whose path is not UTF-8, and reads until the connection is closed or quiet."""
    reader, writer = await connect(address)
    writer.write(NOT_UTF8_PATH)
    with contextlib.suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(0.5):
            while await reader.read(4096):
                pass
    writer.close()


@pytest.mark.sqlite("it is about what is in front of the store")
async def test_a_path_that_is_not_utf8_disturbs_no_other_call(tmp_path: Path) -> None:
    """Any client can send such a call, even without credentials; it ends the server of grpc.aio."""
    async with (
        processes.serving(tmp_path, "--agent", "scripted") as server,
        Client(server.address) as client,
    ):
        handle = await Wire(client).start_blocked("s", "g")
        channel = grpc.aio.insecure_channel(server.address)
        stream: Any = run_service_pb2_grpc.RunServiceStub(channel).SubscribeRunComplete(
            pb.SubscribeRunCompleteRequest(cursor=handle.cursor or "")
        )
        assert (await stream.read()).HasField("progress")
        for _ in range(3):
            await call_strange_path(server.address)
            assert (await client.get_run(handle.run_id)).state is RunState.ACTIVE
        opens = await client.run_accepted("t", script({"open": "g"}), allow_missing=True)
        # This stream does not resume by itself: it was never interrupted.
        ended = {(await stream.read()).run_complete.run_id for _ in range(2)}
        assert ended == {handle.run_id, opens.run_id}
        await channel.close()
        assert await server.stop() == 0
        assert "error" not in server.log


async def test_a_server_that_ends_unexpectedly_is_replaced() -> None:
    """No call is known that ends the server of grpc.aio; this ends it from inside."""
    async with serving() as wire:
        keeping = asyncio.create_task(wire.endpoint.keep_serving())
        await wire.endpoint._server.stop(0)
        async with asyncio.timeout(SECONDS):
            answer = await wire.runs.ListRuns(pb.ListRunsRequest(), wait_for_ready=True)
        assert not answer.runs
        keeping.cancel()
