"""Middleware: every call ends with a status and a log line, and a shutdown waits for handlers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import structlog
from grpc import StatusCode
from structlog.testing import capture_logs
from structlog.typing import EventDict

from runlane_server.access.caller import Caller, Credentials, Role
from runlane_server.access.control import AccessControl
from runlane_server.core.errors import Draining, Overloaded, Unauthenticated
from runlane_server.rpc.inflight import InflightCalls
from runlane_server.rpc.middleware import Middleware
from support.rpc_wire import decode_error, refused

Context = Any
Channel = Any  # its calls take bytes, for which there are no types

CHUNK = b"x" * (1 << 20)


class NoAccessControl(AccessControl):
    """Authorizes every call."""

    def permit(self, caller: Caller, method: str) -> None:
        pass


class Toy:
    """Handlers with every kind of behaviour."""

    def __init__(self) -> None:
        self.ends: asyncio.Queue[str] = asyncio.Queue()
        self.hold = asyncio.Event()
        self.calls = InflightCalls()
        self.address = ""

    async def unary(self, request: bytes, context: Context) -> bytes:
        match request:
            case b"leak":
                raise asyncio.CancelledError
            case b"defect":
                raise RuntimeError("the secret text")
            case b"refuse":
                raise Overloaded("full", retry_after=2.0)
            case b"abort":
                await context.abort(StatusCode.DATA_LOSS, "gone")
            case b"gone":
                raise grpc.aio.InternalError("a write to nobody")
            case b"hang":
                await self._hang()
        return request

    async def _hang(self) -> None:
        self.ends.put_nowait("called")
        try:
            await asyncio.Event().wait()
        finally:
            # Clean-up of a handler after the cancel of its call.
            await self.hold.wait()
            self.ends.put_nowait("cleaned up")

    async def stream(self, request: bytes, context: Context) -> None:
        if request == b"flood":
            self.ends.put_nowait("called")
            try:
                while True:
                    await context.write(CHUNK)
            except BaseException as error:
                self.ends.put_nowait(type(error).__name__)
                raise
        await context.write(b"one")
        if request == b"leak":
            raise asyncio.CancelledError
        raise Draining("going", metadata={"cursor": "c"})

    async def generator(
        self, requests: AsyncIterator[bytes], context: Context
    ) -> AsyncGenerator[bytes, None]:
        task = asyncio.current_task()
        try:
            async for request in requests:
                yield request
        finally:
            self.ends.put_nowait("same task" if asyncio.current_task() is task else "another task")


@asynccontextmanager
async def toy_server() -> AsyncIterator[tuple[Toy, Channel, grpc.aio.Server]]:
    toy = Toy()
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    handlers: dict[str, Any] = {
        "Unary": grpc.unary_unary_rpc_method_handler(toy.unary),
        "Stream": grpc.unary_stream_rpc_method_handler(toy.stream),
        "Generator": grpc.stream_stream_rpc_method_handler(toy.generator),
    }
    Middleware(server, toy.calls, NoAccessControl()).add_registered_method_handlers(
        "runlane.Toy", handlers
    )
    toy.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    channel: Channel
    async with grpc.aio.insecure_channel(toy.address) as channel:
        yield toy, channel, server
    # A client sees the status a moment before the handler has logged the call.
    assert await toy.calls.wait_idle(10)
    await server.stop(0)


def calls_in(logs: list[EventDict]) -> list[tuple[str, str]]:
    return [(line["method"], line["code"]) for line in logs if line["event"] == "call"]


async def unary(channel: Channel, request: bytes) -> Any:
    return await channel.unary_unary("/runlane.Toy/Unary")(request, timeout=10)


async def test_a_response_reaches_the_caller() -> None:
    with capture_logs() as logs:
        async with toy_server() as (toy, channel, _):
            assert await unary(channel, b"hello") == b"hello"
            assert len(toy.calls) == 0
    assert calls_in(logs) == [("Toy/Unary", "OK")]


async def test_a_leaked_cancel_is_aborted_instead_of_a_hang() -> None:
    with capture_logs() as logs:
        async with toy_server() as (_, channel, _):
            error = await refused(unary(channel, b"leak"))
    assert error.code is StatusCode.ABORTED
    assert calls_in(logs) == [("Toy/Unary", "ABORTED")]


async def test_a_leaked_cancel_in_a_stream_is_aborted_too() -> None:
    async with toy_server() as (_, channel, _):
        call = channel.unary_stream("/runlane.Toy/Stream")(b"leak", timeout=10)
        assert await call.read() == b"one"
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
    assert decode_error(raised.value).code is StatusCode.ABORTED


async def test_the_text_of_a_defect_stays_in_the_log() -> None:
    with capture_logs() as logs:
        async with toy_server() as (_, channel, _):
            error = await refused(unary(channel, b"defect"))
    assert (error.code, error.reason) == (StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in error.message
    (logged,) = [line for line in logs if line.get("error_id") == error.metadata["error_id"]]
    assert "secret" in str(logged["exc_info"])


async def test_an_error_is_sent_with_its_details() -> None:
    async with toy_server() as (_, channel, _):
        error = await refused(unary(channel, b"refuse"))
    assert (error.code, error.reason) == (StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert error.retry_after == 2.0


async def test_an_abort_by_the_handler_is_passed_through() -> None:
    with capture_logs() as logs:
        async with toy_server() as (_, channel, _):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await unary(channel, b"abort")
    assert raised.value.code() is StatusCode.DATA_LOSS
    assert calls_in(logs) == [("Toy/Unary", "DATA_LOSS")]


async def test_a_stream_ends_with_its_error() -> None:
    async with toy_server() as (_, channel, _):
        call = channel.unary_stream("/runlane.Toy/Stream")(b"")
        assert await call.read() == b"one"
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
    error = decode_error(raised.value)
    assert (error.code, error.metadata) == (StatusCode.UNAVAILABLE, {"cursor": "c"})


async def test_waiting_for_handlers_includes_their_clean_up() -> None:
    async with toy_server() as (toy, channel, server):
        call = channel.unary_unary("/runlane.Toy/Unary")(b"hang")
        assert await toy.ends.get() == "called"
        await server.stop(0)
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        assert len(toy.calls) == 1
        assert not await toy.calls.wait_idle(0)
        toy.hold.set()
        assert await toy.calls.wait_idle(10)
        assert toy.ends.get_nowait() == "cleaned up"


@pytest.mark.parametrize("how", ["cancel", "close"])
async def test_a_peer_that_leaves_during_a_write_is_logged_as_cancelled(how: str) -> None:
    with capture_logs() as logs:
        async with toy_server() as (toy, _, _):
            other: Channel
            async with grpc.aio.insecure_channel(toy.address) as other:
                call = other.unary_stream("/runlane.Toy/Stream")(b"flood")
                assert await toy.ends.get() == "called"
                assert await call.read() == CHUNK
                if how == "cancel":
                    call.cancel()
            assert await toy.ends.get() in {"ExecuteBatchError", "CancelledError"}
            assert await toy.calls.wait_idle(10)
    assert calls_in(logs) == [("Toy/Stream", "CANCELLED")]
    assert not [line for line in logs if line["log_level"] == "error"]


async def test_a_failed_write_is_logged_as_cancelled() -> None:
    """grpc reports either the failed write or the cancel first; this is the former."""
    with capture_logs() as logs:
        async with toy_server() as (_, channel, _):
            with pytest.raises(grpc.aio.AioRpcError):
                await unary(channel, b"gone")
    assert [(line["method"], line["code"]) for line in logs] == [("Toy/Unary", "CANCELLED")]


async def test_a_generator_is_closed_in_its_own_task() -> None:
    async with toy_server() as (toy, channel, _):
        call = channel.stream_stream("/runlane.Toy/Generator")()
        await call.write(b"a")
        assert await call.read() == b"a"
        call.cancel()
        assert await toy.ends.get() == "same task"
        assert await toy.calls.wait_idle(10)


async def test_an_unknown_method_is_unimplemented() -> None:
    async with toy_server() as (_, channel, _):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_unary("/runlane.Toy/Nothing")(b"")
    assert raised.value.code() is StatusCode.UNIMPLEMENTED


async def test_context_of_the_log_is_limited_to_its_call() -> None:
    seen: list[dict[str, Any]] = []

    async def bind(request: bytes, context: Context) -> bytes:
        seen.append(structlog.contextvars.get_contextvars())
        structlog.contextvars.bind_contextvars(run_id=request.decode())
        return b""

    server = grpc.aio.server()
    Middleware(server, InflightCalls(), NoAccessControl()).add_registered_method_handlers(
        "runlane.Toy", {"Bind": grpc.unary_unary_rpc_method_handler(bind)}
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
        channel: Channel
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await channel.unary_unary("/runlane.Toy/Bind")(b"one")
            await channel.unary_unary("/runlane.Toy/Bind")(b"two")
    await server.stop(0)
    assert [line["run_id"] for line in logs] == ["one", "two"]
    assert seen == [{}, {}]


class Revocable:
    """Authenticates every call until it is closed."""

    def __init__(self) -> None:
        self.open = True

    def authenticate(self, credentials: Credentials) -> Caller:
        if not self.open:
            raise Unauthenticated("not any more")
        return Caller("acme", Role.ADMIN, "alice")


async def test_a_revoked_call_with_a_slow_reader_ends_once_it_reads_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("runlane_server.access.control.is_allowed", lambda role, method: True)
    toy, identities, calls = Toy(), Revocable(), InflightCalls()
    access_control = AccessControl(identities)
    server = grpc.aio.server()
    handlers: dict[str, Any] = {"Stream": grpc.unary_stream_rpc_method_handler(toy.stream)}
    Middleware(server, calls, access_control).add_registered_method_handlers(
        "runlane.Toy", handlers
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel: Channel
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(30):
        call = channel.unary_stream("/runlane.Toy/Stream")(b"flood")
        assert await toy.ends.get() == "called"
        (open_call,) = access_control._open_calls
        # It writes without end, so sooner or later a write blocks.
        while not open_call.is_sending:
            await asyncio.sleep(0)
        identities.open = False
        access_control.recheck()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await read_on(call)
        assert decode_error(raised.value).code is StatusCode.UNAUTHENTICATED
        assert await toy.ends.get() == "Unauthenticated"
        assert await calls.wait_idle(10)
    await server.stop(0)


async def read_on(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_the_line_of_a_call_names_its_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runlane_server.access.control.is_allowed", lambda role, method: True)
    server = grpc.aio.server()
    handlers: dict[str, Any] = {"Unary": grpc.unary_unary_rpc_method_handler(Toy().unary)}
    Middleware(server, InflightCalls(), AccessControl(Revocable())).add_registered_method_handlers(
        "runlane.Toy", handlers
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
        channel: Channel
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await unary(channel, b"hello")
    await server.stop(0)
    assert [(line["method"], line["caller"]) for line in logs] == [("Toy/Unary", "alice")]
