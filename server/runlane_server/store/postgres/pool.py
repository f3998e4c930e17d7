"""A pool of connections for statements that may be repeated.

Tenants take turns at its connections, so that no read waits for all those of another tenant.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import asyncpg
import structlog

from runlane_server.store.fair_queue import FairSlots
from runlane_server.store.postgres.connection import (
    CONNECT_TIMEOUT,
    FAILURES,
    NOT_READ,
    READ_TIMEOUT,
    Connector,
    describe,
    is_refusal,
    unavailable,
    wrote_nothing,
)

if TYPE_CHECKING:
    from asyncpg.pool import Pool as AsyncpgPool

log = structlog.get_logger()

MOST_CONNECTIONS = 8
TRIES = 2
"""A statement that fails is repeated once, on a new connection: after a restart of the database all
pooled connections are dead."""


class Pool:
    """Opens connections as needed. Send only statements that may be repeated."""

    def __init__(self, pool: AsyncpgPool[asyncpg.Record], most: int, timeout: float) -> None:
        self._pool = pool
        self._slots = FairSlots(most)
        self._timeout = timeout
        self._releasing: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(
        cls, connector: Connector, *, most: int = MOST_CONNECTIONS, timeout: float = READ_TIMEOUT
    ) -> Pool:
        """An empty pool of up to `most` connections. `timeout` is the limit of a statement, in
        seconds."""

        async def connect(*_args: object, **_kwargs: object) -> asyncpg.Connection[asyncpg.Record]:
            return await connector.connect()

        pool = await asyncpg.create_pool(
            min_size=0,
            max_size=most,
            connect=connect,
            # No statement changes a connection, so a reset would be a round trip for nothing.
            reset=_skip_reset,
        )
        return cls(pool, most, timeout)

    async def close(self) -> None:
        """Closes the connections at once, also those in use."""
        self._pool.terminate()

    async def fetch(self, query: str, *args: object, tenant: str = "") -> Sequence[Any]:
        """The rows of a statement, in one round trip. Raises StoreUnavailable."""
        for tries in range(1, TRIES + 1):
            try:
                return await self._fetch(query, args, tenant)
            except FAILURES as error:
                if is_refusal(error):
                    raise
                if not wrote_nothing(error):
                    await self._pool.expire_connections()
                if tries == TRIES or isinstance(error, TimeoutError):
                    raise unavailable(NOT_READ, error) from error
        raise AssertionError("unreachable")

    async def _fetch(self, query: str, args: Sequence[object], tenant: str) -> Sequence[Any]:
        connection = await self._acquire(tenant)
        try:
            rows: Sequence[Any] = await connection.fetch(query, *args, timeout=self._timeout)
        except asyncio.CancelledError:
            # On release the driver sends the cancel to the server and waits for its answer. A
            # cancelled caller must not wait for a server that may be unavailable.
            releasing = asyncio.create_task(self._release(connection))
            self._releasing.add(releasing)
            releasing.add_done_callback(self._on_released)
            raise
        except BaseException as error:
            if isinstance(error, TimeoutError):
                # The server does not answer, so it cannot receive a cancel either.
                connection.terminate()
            await self._release(connection)
            raise
        await self._release(connection)
        return rows

    async def _acquire(self, tenant: str) -> Any:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            await self._slots.acquire(tenant)
        try:
            return await self._pool.acquire(timeout=CONNECT_TIMEOUT)
        except BaseException:
            self._slots.release()
            raise

    async def _release(self, connection: Any) -> None:
        try:
            await self._pool.release(connection)
        finally:
            self._slots.release()

    def _on_released(self, releasing: asyncio.Task[None]) -> None:
        self._releasing.discard(releasing)
        if not releasing.cancelled() and (error := releasing.exception()) is not None:
            log.debug("connection lost on release", error=describe(error))

    async def fetchrow(self, query: str, *args: object, tenant: str = "") -> Any:
        """The first row of a statement, or None."""
        rows = await self.fetch(query, *args, tenant=tenant)
        return rows[0] if rows else None


async def _skip_reset(_connection: object) -> None:
    pass
