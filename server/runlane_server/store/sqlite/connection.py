"""A connection to SQLite that runs a whole function at a time in its thread."""

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
"""Seconds to wait for a lock. Only another program that has the file open ever holds one."""


def as_is(text: str) -> str:
    """SQLite keeps any text as it is."""
    return text


def any_text(data: bytes) -> str:
    """Decodes text that may not be UTF-8: bytes that are not become lone surrogates."""
    return data.decode(errors="surrogateescape")


class SqliteConnection(aiosqlite.Connection):
    """An aiosqlite connection that runs a whole function in one hop to its thread.

    A hop costs as much as many statements. No other function runs between two reads of one
    function, so it needs no lock.
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
            # aiosqlite stops its thread without waiting for it. If the server exits now, the thread
            # finds the loop closed and prints a traceback.
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

        Cancelling ends the wait, not the task.
        """
        return await self.submit(task, *args, **kwargs)

    def submit(
        self,
        task: Callable[Concatenate[sqlite3.Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Future[T]:
        """Schedules `task(connection, ...)`; returns its future. Tasks run in call order."""
        if not self._running:
            raise ValueError("the connection is closed")
        future: Future[T] = asyncio.get_running_loop().create_future()
        self._tx.put_nowait((future, partial(task, self._conn, *args, **kwargs)))
        return future
