"""A connection to SQLite that does a whole piece of work at a time."""

from __future__ import annotations

import asyncio
import sqlite3
from asyncio import Future
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Concatenate, ParamSpec, Self, TypeVar

import aiosqlite

P = ParamSpec("P")
T = TypeVar("T")

BUSY_TIMEOUT = 10.0
"""Seconds to wait for a lock. Only a foreign tool on the file ever holds one."""


class SqliteConnection(aiosqlite.Connection):
    """An aiosqlite connection on which a function is one hop to the thread, however much it does.

    A hop costs as much as many statements, and a function that reads twice needs no lock against
    the one that reads in between.
    """

    def __init__(self, path: Path) -> None:
        def connect() -> sqlite3.Connection:
            connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None)
            connection.row_factory = sqlite3.Row
            return connection

        super().__init__(connect, iter_chunk_size=64)

    async def __aenter__(self) -> Self:
        try:
            await super().__aenter__()
        except sqlite3.Error:
            # aiosqlite tells its thread to end and does not wait. Where the server ends next, the
            # thread would find the loop closed, and say so at length.
            await asyncio.to_thread(self._thread.join)
            raise
        return self

    async def work(
        self,
        task: Callable[Concatenate[sqlite3.Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Runs `task(connection, ...)` in the connection's thread.

        Cancelling ends the wait, not the work.
        """
        return await self.submit(task, *args, **kwargs)

    def submit(
        self,
        task: Callable[Concatenate[sqlite3.Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Future[T]:
        """The same for whoever does not wait; works are done in the order of their calls."""
        if not self._running:
            raise ValueError("the connection is closed")
        future: Future[T] = asyncio.get_running_loop().create_future()
        self._tx.put_nowait((future, partial(task, self._conn, *args, **kwargs)))
        return future
