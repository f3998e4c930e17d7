"""The HTTP/1.1 protocol of uvicorn, with limits on connections."""

from __future__ import annotations

import asyncio
import resource
from collections import Counter
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 10_000
"""Maximum number of connections, where the process may open twice as many files."""

MAX_PER_ADDRESS = 1_000
"""Maximum number of connections from one address, which may be a proxy with many users."""

HEAD_TIMEOUT = 10.0
"""Seconds within which a connection must have sent a whole request."""


def max_connections() -> int:
    """The limit of this process: the rest of its files is for the server and its own use."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if files < 0 else min(MAX_CONNECTIONS, files // 2)


class Connections:
    """Counts connections, in all and of each address."""

    def __init__(self, limit: int = 0, per_address: int = MAX_PER_ADDRESS) -> None:
        self._limit = limit or max_connections()
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
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Parses what came."""
        if not self._address:
            return
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Goes on to the next request, a part of which may have come."""
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """Runs a timer exactly while a request is begun, or none was, and is not complete."""
        if not self._is_waiting():
            if self._head is not None:
                self._head.cancel()
                self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_TIMEOUT, self._give_up)

    def _is_waiting(self) -> bool:
        if self.transport.is_closing():
            return False
        cycle: Any = self.cycle  # None until the first request
        if self.conn.their_state is h11.SEND_BODY:
            # The rest of a body that was not read, since its request was refused.
            return cycle is not None and bool(cycle.response_complete)
        idle = self.conn.their_state is h11.IDLE
        # Between two requests uvicorn's own timer runs, until the first byte.
        return idle and (cycle is None or bool(self.conn.trailing_data[0]))

    def connection_lost(self, exc: Exception | None) -> None:
        """Releases the connection's place."""
        if not self._address:
            return
        if self._head is not None:
            self._head.cancel()
        self.counts.release(self._address)
        super().connection_lost(exc)

    def _give_up(self) -> None:
        # A close would wait for a reader that takes nothing.
        self.transport.abort()


def bounded_protocol(connections: Connections) -> type[asyncio.Protocol]:
    """Returns the protocol class for a server that shares these counts."""
    return type("BoundedProtocol", (BoundedProtocol,), {"counts": connections})
