"""Connections that stay open between deliveries: each has an end, and all have a limit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import pytest

from runlane_server.webhooks import connections as connections_module
from runlane_server.webhooks.sender import Sender
from support.deliveries import LOCAL
from support.endpoint import http, listening


@dataclass
class Peer:
    """An endpoint that keeps connections open, and knows which of them are."""

    ends: bool = False
    after: bytes = b""
    seen: int = 0
    open: set[asyncio.StreamWriter] = field(default_factory=set)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open.add(writer)
        self.seen += 1
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n{}")
                writer.write(http(200))
                if self.ends:
                    writer.write_eof()
                if self.after:
                    await writer.drain()
                    asyncio.get_running_loop().call_later(0.02, writer.write, self.after)
        finally:
            self.open.discard(writer)
            async with self._changed:
                self._changed.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10), self._changed:
            await self._changed.wait_for(condition)


async def post(sender: Sender, port: int, tenant: str = "t") -> None:
    answer = await sender.post(f"http://127.0.0.1:{port}/", {}, b"{}", tenant=tenant)
    assert answer.status == 200


async def test_r55_an_idle_connection_closes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections_module, "IDLE_SECONDS", 0.05)
    peer, sender = Peer(), Sender(LOCAL)
    async with listening(peer.serve) as port:
        await post(sender, port)
        assert len(sender._idle) == 1
        await peer.until(lambda: not peer.open)
        assert len(sender._idle) == 0
    sender.close()


@pytest.mark.parametrize("peer", [Peer(ends=True), Peer(after=b"HTTP/1.1 200 OK\r\n")])
async def test_r55_an_idle_connection_closes_when_the_endpoint_ends_or_speaks(peer: Peer) -> None:
    sender = Sender(LOCAL)
    async with listening(peer.serve) as port:
        await post(sender, port)
        await peer.until(lambda: not peer.open)
        assert len(sender._idle) == 0
    sender.close()


async def test_the_time_of_a_connection_begins_again_with_each_delivery() -> None:
    peer, sender = Peer(), Sender(LOCAL)
    loop = asyncio.get_running_loop()
    async with listening(peer.serve) as port:
        await post(sender, port)
        [first] = sender._idle._idle
        timer = first._timer
        await post(sender, port)
        [again] = sender._idle._idle
        assert (first, peer.seen) == (again, 1)
        assert timer is not None
        assert timer.cancelled()
        assert again._timer is not None
        assert again._timer.when() > loop.time() + connections_module.IDLE_SECONDS - 5
    sender.close()


async def test_r55_idle_connections_are_bounded_for_a_tenant_and_in_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections_module, "IDLE_OF_ENDPOINT", 2)
    monkeypatch.setattr(connections_module, "IDLE_OF_TENANT", 3)
    monkeypatch.setattr(connections_module, "MAX_IDLE", 5)
    peer, sender = Peer(), Sender(LOCAL)
    async with AsyncExitStack() as closing:
        ports = [await closing.enter_async_context(listening(peer.serve)) for _ in range(4)]
        await asyncio.gather(*(post(sender, ports[0]) for _ in range(4)))
        assert len(sender._idle) == 2  # of one endpoint
        for port in ports:
            await post(sender, port)
        assert len(sender._idle) == 3  # of one tenant
        for port in ports:
            await post(sender, port, "u")
        assert len(sender._idle) == 5
        tenants = [its.tenant for its in sender._idle._idle.values()]
        assert tenants == ["t", "t", "u", "u", "u"]  # the longest idle one went
        await peer.until(lambda: len(peer.open) == 5)
    sender.close()


async def test_a_connection_is_not_used_for_another_tenant() -> None:
    peer, sender = Peer(), Sender(LOCAL)
    async with listening(peer.serve) as port:
        for tenant in ("t", "u", "t", "u"):
            await post(sender, port, tenant)
        assert peer.seen == 2
    sender.close()


async def test_no_connection_outlives_its_sender() -> None:
    peer, sender = Peer(), Sender(LOCAL)
    async with listening(peer.serve) as port:
        await post(sender, port)
        sender.close()
        await peer.until(lambda: not peer.open)
