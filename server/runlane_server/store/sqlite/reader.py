"""The one reader of a database file: what waits to be looked up shares a hop to its thread."""

from __future__ import annotations

import asyncio
import sqlite3
from asyncio import Future
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeAlias, TypeVar

from runlane_server.store.batching import MAX_PAUSE, Pace
from runlane_server.store.sqlite.connection import SqliteConnection

P = ParamSpec("P")
T = TypeVar("T")

MAX_SHARED = 64
"""How much is looked up in a hop: bounds how long the first one waits for the last."""

Call: TypeAlias = Callable[[sqlite3.Connection], Any]
Outcome: TypeAlias = tuple[Any, Exception | None]


class _Waiting(NamedTuple):
    call: Call
    future: Future[Any]
    alone: bool


class SqliteReader:
    """Owns the read connection.

    A hop to its thread costs as much as many things looked up by their key. While one is under way
    the others wait, and go together then; when the event loop has no time to spare it holds back a
    little. A page, which may be large, has a hop to itself: nobody waits for one but those who came
    later.
    """

    def __init__(self, connection: SqliteConnection) -> None:
        self._connection = connection
        self._waiting: deque[_Waiting] = deque()
        self._hop: Future[list[Outcome]] | None = None
        self._batch: Sequence[_Waiting] = ()
        self._pace = Pace(MAX_PAUSE / 4)
        self._pausing: asyncio.TimerHandle | None = None

    async def look_up(
        self,
        read: Callable[Concatenate[sqlite3.Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Reads a few rows by their key. Cancelling only ends the wait."""
        return await self._read(_call(read, *args, **kwargs), alone=False)

    async def page(
        self,
        read: Callable[Concatenate[sqlite3.Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Reads what may be long. Cancelling only ends the wait."""
        return await self._read(_call(read, *args, **kwargs), alone=True)

    async def close(self) -> None:
        """Waits for the reads that were begun."""
        if self._pausing is not None:
            self._go()
        while self._hop is not None:
            # `_arrived` has been called when this returns, and may have begun the next one.
            await asyncio.wait([self._hop])

    async def _read(self, call: Callable[[sqlite3.Connection], T], *, alone: bool) -> T:
        future: Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(call, future, alone))
        self._begin()
        return await future

    def _begin(self) -> None:
        """Begins the next hop, now or when it has more company."""
        if self._hop is not None or self._pausing is not None:
            return
        if pause := self._pace.pause():
            self._pausing = asyncio.get_running_loop().call_later(pause, self._go)
        else:
            self._go()

    def _go(self) -> None:
        if self._pausing is not None:
            self._pausing.cancel()
            self._pausing = None
        self._batch = _next_batch(self._waiting)
        self._hop = self._connection.submit(_snapshot, [waiting.call for waiting in self._batch])
        self._hop.add_done_callback(self._arrived)

    def _arrived(self, hop: Future[list[Outcome]]) -> None:
        batch, self._batch, self._hop = self._batch, (), None
        error = hop.exception()
        outcomes = [(None, error)] * len(batch) if error is not None else hop.result()
        self._pace.went(len(batch))
        if self._waiting:
            self._begin()
        for waiting, (result, why) in zip(batch, outcomes, strict=True):
            if waiting.future.done():
                continue
            if why is None:
                waiting.future.set_result(result)
            else:
                waiting.future.set_exception(why)


def _call(
    read: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs
) -> Callable[[sqlite3.Connection], T]:
    return lambda db: read(db, *args, **kwargs)


def _next_batch(waiting: deque[_Waiting]) -> list[_Waiting]:
    batch = [waiting.popleft()]
    if not batch[0].alone:
        while waiting and not waiting[0].alone and len(batch) < MAX_SHARED:
            batch.append(waiting.popleft())
    return batch


def _snapshot(db: sqlite3.Connection, calls: Sequence[Call]) -> list[Outcome]:
    """Reads in one transaction, so that all statements see the same commits. Each has an outcome of
    its own."""
    db.execute("BEGIN")
    try:
        return [_outcome(db, call) for call in calls]
    finally:
        if db.in_transaction:  # an error may have ended it
            db.execute("ROLLBACK")


def _outcome(db: sqlite3.Connection, call: Call) -> Outcome:
    try:
        return call(db), None
    except Exception as error:  # noqa: BLE001 - whoever waits is told
        return None, error
