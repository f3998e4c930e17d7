"""The connections that read."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import asyncpg
import structlog

from runlane_server.store.postgres.connection import (
    CONNECT_TIMEOUT,
    FAILURES,
    NOT_READ,
    READ_TIMEOUT,
    Connector,
    describe,
    is_certain,
    is_refusal,
    unavailable,
)

if TYPE_CHECKING:
    from asyncpg.pool import Pool as AsyncpgPool

log = structlog.get_logger()

MOST_CONNECTIONS = 8
TRIES = 2
"""A statement is repeated once on a connection of its own: after a restart of the database those in
the pool are all dead. Nothing is sent here that may not be repeated."""


class Pool:
    """Connections for statements that may be repeated, made as they are needed."""

    def __init__(self, pool: AsyncpgPool[asyncpg.Record], timeout: float) -> None:
        self._pool = pool
        self._timeout = timeout
        self._releasing: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(
        cls, connector: Connector, *, most: int = MOST_CONNECTIONS, timeout: float = READ_TIMEOUT
    ) -> Pool:
        """A pool without any connection yet, of `most` later on. A statement that takes longer than
        `timeout` seconds is given up."""

        async def connect(*_args: object, **_kwargs: object) -> asyncpg.Connection[asyncpg.Record]:
            return await connector.connect()

        pool = await asyncpg.create_pool(
            min_size=0,
            max_size=most,
            connect=connect,
            # No statement leaves anything behind, so there is nothing to reset by one.
            reset=_keep,
        )
        return cls(pool, timeout)

    async def close(self) -> None:
        """Closes the connections, whatever they are doing."""
        self._pool.terminate()

    async def fetch(self, query: str, *args: object) -> Sequence[Any]:
        """The rows of a statement, in one round trip. Raises StoreUnavailable."""
        for tries in range(1, TRIES + 1):
            try:
                return await self._fetch(query, args)
            except FAILURES as error:
                if is_refusal(error):
                    raise
                if not is_certain(error):
                    await self._pool.expire_connections()
                if tries == TRIES or isinstance(error, TimeoutError):
                    raise unavailable(NOT_READ) from error
        raise AssertionError("unreachable")

    async def _fetch(self, query: str, args: Sequence[object]) -> Sequence[Any]:
        connection = await self._pool.acquire(timeout=CONNECT_TIMEOUT)
        try:
            rows = await connection.fetch(query, *args, timeout=self._timeout)
        except asyncio.CancelledError:
            # The driver first tells the server of it, and waits for an answer. Who was cancelled
            # does not wait for a server that may be away.
            releasing = asyncio.create_task(self._pool.release(connection))
            self._releasing.add(releasing)
            releasing.add_done_callback(self._released)
            raise
        except BaseException as error:
            if isinstance(error, TimeoutError):
                # Nobody is there to be told of a cancel.
                connection.terminate()
            await self._pool.release(connection)
            raise
        await self._pool.release(connection)
        return rows

    def _released(self, releasing: asyncio.Task[None]) -> None:
        self._releasing.discard(releasing)
        if not releasing.cancelled() and (error := releasing.exception()) is not None:
            log.debug("a connection broke as it was given back", error=describe(error))

    async def fetchrow(self, query: str, *args: object) -> Any:
        """The first row of a statement, or None."""
        rows = await self.fetch(query, *args)
        return rows[0] if rows else None


async def _keep(_connection: object) -> None:
    pass
