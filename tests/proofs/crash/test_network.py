"""The network of nodes: a cut affects one link and no other."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator

import pytest

from proofs.crash.network import Network, Side, namespaces, proxies, why_no_namespaces
from support.staging import SECONDS

ECHO = """
import asyncio, sys

async def echo(reader, writer):
    while data := await reader.read(100):
        writer.write(data)

async def main():
    host, _, port = sys.argv[1].rpartition(":")
    server = await asyncio.start_server(echo, host, int(port))
    print("%s:%s" % server.sockets[0].getsockname(), flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


@pytest.fixture(params=["namespaces", "proxies"])
async def network(request: pytest.FixtureRequest) -> AsyncIterator[Network]:
    if request.param == "proxies":
        async with proxies(2) as made:
            yield made
        return
    if why := why_no_namespaces():
        pytest.skip(why)
    with namespaces(2) as spaces:
        yield spaces


@pytest.fixture
async def echoing(network: Network) -> AsyncIterator[Network]:
    """A network whose node 0 echoes."""
    process = await asyncio.create_subprocess_exec(
        *(*network.prefix(0), sys.executable, "-c", ECHO, network.listen(0)), stdout=PIPE
    )
    assert process.stdout is not None
    try:
        network.serving(0, (await process.stdout.readline()).decode().strip())
        yield network
    finally:
        process.kill()
        await process.wait()


class Caller:
    """A connection to node 0."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def of(cls, network: Network) -> Caller:
        host, _, port = network.address(0).rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    def send(self) -> None:
        self._writer.write(b"x")

    async def receive(self, seconds: float = SECONDS) -> bytes:
        async with asyncio.timeout(seconds):
            return await self._reader.readexactly(1)

    def leave(self) -> None:
        self._writer.transport.abort()


async def test_a_cut_link_falls_silent_and_recovers(echoing: Network) -> None:
    caller = await Caller.of(echoing)
    caller.send()
    assert await caller.receive() == b"x"
    await echoing.cut(0, Side.STORE, reset=False)
    await echoing.cut(1, Side.CLIENTS, reset=False)
    caller.send()
    assert await caller.receive() == b"x"
    await echoing.cut(0, Side.CLIENTS, reset=False)
    caller.send()
    with pytest.raises(TimeoutError):
        await caller.receive(0.2)
    await echoing.mend(0, Side.CLIENTS)
    assert await caller.receive() == b"x"
    caller.leave()


async def test_a_reset_breaks_connections_and_allows_new_ones(echoing: Network) -> None:
    caller = await Caller.of(echoing)
    caller.send()
    assert await caller.receive() == b"x"
    await echoing.cut(0, Side.CLIENTS, reset=True)
    with pytest.raises((OSError, EOFError)):
        await caller.receive()
    caller.leave()
    await echoing.mend(0, Side.CLIENTS)
    again = await Caller.of(echoing)
    again.send()
    assert await again.receive() == b"x"
    again.leave()
