"""Connections to endpoints, and those of them that are idle and kept for the next delivery."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

MAX_IDLE, IDLE_OF_TENANT, IDLE_OF_ENDPOINT = 256, 32, 16
"""Idle connections of a node, of a tenant, and of one tenant to one endpoint."""

IDLE_SECONDS = 20.0
"""Seconds after which an idle connection is closed."""


class Endpoint(NamedTuple):
    """The address and the tenant of a connection."""

    tenant: str
    is_https: bool
    host: str
    port: int


class _Protocol(asyncio.StreamReaderProtocol):
    """Calls `on_input` for anything that arrives, the end included."""

    on_input: Callable[[], None] | None = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._note()

    def eof_received(self) -> bool | None:
        keeps_open = super().eof_received()
        self._note()
        return keeps_open

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._note()

    def _note(self) -> None:
        if self.on_input is not None:
            self.on_input()


class Connection:
    """A connection to an endpoint."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, protocol: _Protocol
    ) -> None:
        self.reader = reader
        self.writer = writer
        self._protocol = protocol
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    async def open(
        cls, address: str, endpoint: Endpoint, *, tls: ssl.SSLContext | None, limit: int
    ) -> Connection:
        """Connects to one address of an endpoint. Raises OSError."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit, loop)
        protocol = _Protocol(reader, loop=loop)
        transport, _ = await loop.create_connection(
            lambda: protocol,
            address,
            endpoint.port,
            ssl=tls,
            server_hostname=endpoint.host if tls else None,
        )
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        return cls(reader, writer, protocol)

    @property
    def is_open(self) -> bool:
        return not (self.reader.at_eof() or self.writer.is_closing())

    def close(self) -> None:
        """Closes it at once."""
        self.wake()
        self.writer.transport.abort()

    def rest(self, on_end: Callable[[], None]) -> None:
        """Calls `on_end` when it has been idle for too long, or the endpoint sends or closes."""
        self._protocol.on_input = on_end
        self._timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, on_end)

    def wake(self) -> None:
        """Ends `rest`."""
        self._protocol.on_input = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class IdleConnections:
    """Idle connections. Each is closed when its time is over or the endpoint closes it."""

    def __init__(self) -> None:
        self._idle: dict[Connection, Endpoint] = {}  # the longest idle first

    def __len__(self) -> int:
        return len(self._idle)

    def close(self) -> None:
        """Closes all."""
        for connection in tuple(self._idle):
            self._drop(connection)

    def take(self, endpoint: Endpoint) -> Connection | None:
        """The latest used connection to an endpoint; None if there is none."""
        for connection, its in reversed(self._idle.items()):
            if its == endpoint:
                del self._idle[connection]
                connection.wake()
                return connection
        return None

    def put(self, endpoint: Endpoint, connection: Connection) -> None:
        """Keeps a connection, and closes the longest idle one if there are too many."""
        if not connection.is_open:
            connection.close()
            return
        self._idle[connection] = endpoint
        connection.rest(partial(self._drop, connection))
        self._limit(IDLE_OF_ENDPOINT, lambda its: its == endpoint)
        self._limit(IDLE_OF_TENANT, lambda its: its.tenant == endpoint.tenant)
        self._limit(MAX_IDLE, lambda _: True)

    def _limit(self, most: int, counts: Callable[[Endpoint], bool]) -> None:
        found = [connection for connection, its in self._idle.items() if counts(its)]
        for connection in found[: max(0, len(found) - most)]:
            self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        del self._idle[connection]
        connection.close()
