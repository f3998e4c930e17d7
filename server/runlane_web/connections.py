"""The HTTP/1.1 protocol of uvicorn, with limits on connections."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 10_000
"""Maximum number of connections."""

MAX_PER_ADDRESS = 1_000
"""Maximum number of connections from one address, which may be a proxy with many users."""

HEAD_TIMEOUT = 10.0
"""Seconds within which a connection must have sent a whole request."""


class Connections:
    """Counts connections, in all and of each address."""

    def __init__(self, limit: int = MAX_CONNECTIONS, per_address: int = MAX_PER_ADDRESS) -> None:
        self._limit = limit
        self._per_address = per_address
        self._open: Counter[str] = Counter()

    def take(self, address: str) -> bool:
        """Counts a connection; False if there is no room for it."""
        if self._open.total() >= self._limit or self._open[address] >= self._per_address:
            return False
        self._open[address] += 1
        return True

    def release(self, address: str) -> None:
        """Forgets a connection."""
        self._open[address] -= 1
        if self._open[address] <= 0:
            del self._open[address]


class BoundedProtocol(H11Protocol):
    """A connection that is counted, and closed if it sends no request in time."""

    counts: Connections
    _address = ""
    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Closes the connection if there is no room for it."""
        peer = transport.get_extra_info("peername")
        address = str(peer[0]) if isinstance(peer, tuple) else "local"
        if not self.counts.take(address):
            transport.abort()
            return
        self._address = address
        super().connection_made(transport)
        # Without a request no timer of uvicorn's own runs.
        self._head = self.loop.call_later(HEAD_TIMEOUT, self._give_up)

    def data_received(self, data: bytes) -> None:
        """Parses what came."""
        if self._address:
            super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Releases the connection's place."""
        if not self._address:
            return
        if self._head is not None:
            self._head.cancel()
        self.counts.release(self._address)
        super().connection_lost(exc)

    def _give_up(self) -> None:
        no_request_yet = self.cycle is None
        if no_request_yet:
            self.transport.close()


def bounded_protocol(connections: Connections) -> type[asyncio.Protocol]:
    """Returns the protocol class for a server that shares these counts."""
    return type("BoundedProtocol", (BoundedProtocol,), {"counts": connections})
