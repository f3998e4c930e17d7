"""The event loop reads the wake-ups of gRPC at once."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable
from typing import Any

import grpc
import grpc.aio
import pytest
import uvloop

from runlane_server.rpc import wakeups
from runlane_server.rpc.wakeups import read_all, with_wakeups

MESSAGES = 200


def test_one_call_handles_all_bytes() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"1" * 100)
        calls: list[bytes] = []
        read_all(ours, lambda: calls.append(ours.recv(1)))
        ours.setblocking(False)
        assert calls == [b"1"]
        with pytest.raises(BlockingIOError):
            ours.recv(1)


async def _stream() -> list[bytes]:
    """Sends messages as fast as gRPC takes them, with several calls at a time."""

    async def serve(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        for n in range(MESSAGES):
            await context.write(b"%d" % n)

    handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_stream_rpc_method_handler(serve)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("t", {"S": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:

        async def read() -> list[bytes]:
            method: Any = channel.unary_stream("/t/S")
            return [message async for message in method(b"")]

        calls: list[Awaitable[list[bytes]]] = [read() for _ in range(8)]
        found = await asyncio.gather(*calls)
    await server.stop(None)
    assert all(one == found[0] for one in found)
    return found[0]


@pytest.mark.parametrize("kind", [asyncio.SelectorEventLoop, uvloop.Loop])
def test_grpc_works_on_such_a_loop(
    kind: type[asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = 0

    def counted(*args: Any) -> None:
        nonlocal reads
        reads += 1
        read_all(*args)

    monkeypatch.setattr(wakeups, "read_all", counted)
    with asyncio.Runner(loop_factory=with_wakeups(kind)) as runner:
        messages = runner.run(_stream())
    assert messages == [b"%d" % n for n in range(MESSAGES)]
    # Each message is at least two operations. Without a read the loop was not recognized.
    assert 0 < reads < 8 * MESSAGES
