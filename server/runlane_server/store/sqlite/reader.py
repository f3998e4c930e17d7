"""The only reader of a database file: lookups that wait share one hop to its thread."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from asyncio import Future
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeAlias, TypeVar

from runlane_server.store.batching import MAX_DELAY, Pacer
from runlane_server.store.fair_queue import FairQueue
from runlane_server.store.sqlite.connection import SqliteConnection, any_text

P = ParamSpec("P")
T = TypeVar("T")

MAX_SHARED = 64
"""The most lookups in one hop: bounds how long the first of them waits for the last."""

HOP_SECONDS = 0.01
"""Time after which a hop begins no other lookup: the rows of some are large."""

Call: TypeAlias = Callable[[sqlite3.Connection], Any]
Outcome: TypeAlias = tuple[Any, Exception | None]


class _Waiting(NamedTuple):
    tenant: str
    call: Call
    future: Future[Any]
    alone: bool


class SqliteReader:
    """Owns the read connection.

    A hop to its thread costs as much as many lookups by key. Lookups that arrive during a hop wait
    and share the next one; while the event loop is busy, a hop waits a little for more of them. A
    page, which may be large, has a hop to itself, so that only later calls wait for it. Tenants
    take turns, and a read whose caller has gone away is not made.
    """

    def __init__(self, connection: SqliteConnection) -> None:
        self._connection = connection
        self._waiting: FairQueue[_Waiting] = FairQueue()
        self._hop: Future[list[Outcome]] | None = None
        self._batch: Sequence[_Waiting] = ()
        self._pacer = Pacer(MAX_DELAY / 4)
        self._delayed: asyncio.TimerHandle | None = None

    async def look_up(
        self,
        read: Callable[Concatenate[sqlite3.Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Reads a few rows by key. Cancelling ends the wait only."""
        return await self._read(_tenant_of(args), _call(read, *args, **kwargs), alone=False)

    async def page(
        self,
        read: Callable[Concatenate[sqlite3.Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Reads a page, which may be large. Cancelling ends the wait only."""
        return await self._read(_tenant_of(args), _call(read, *args, **kwargs), alone=True)

    async def close(self) -> None:
        """Waits for pending reads."""
        while self._hop is not None or self._delayed is not None:
            if self._hop is None:
                self._start()
            else:
                # When this returns, `_on_hop_done` was called and may have started the next hop.
                await asyncio.wait([self._hop])

    async def _read(
        self, tenant: str, call: Callable[[sqlite3.Connection], T], *, alone: bool
    ) -> T:
        future: Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.add(tenant, _Waiting(tenant, call, future, alone))
        self._schedule()
        return await future

    def _schedule(self) -> None:
        """Starts the next hop, now or after a delay."""
        if self._hop is not None or self._delayed is not None:
            return
        if delay := self._pacer.delay():
            self._delayed = asyncio.get_running_loop().call_later(delay, self._start)
        else:
            self._start()

    def _start(self) -> None:
        if self._delayed is not None:
            self._delayed.cancel()
            self._delayed = None
        self._batch = _next_batch(self._waiting)
        if not self._batch:
            return  # all callers have left
        calls = [waiting.call for waiting in self._batch]
        self._hop = self._connection.submit(_read_together, calls)
        self._hop.add_done_callback(self._on_hop_done)

    def _on_hop_done(self, hop: Future[list[Outcome]]) -> None:
        batch, self._batch, self._hop = self._batch, (), None
        error = hop.exception()
        outcomes = [(None, error)] * len(batch) if error is not None else hop.result()
        self._pacer.record(len(outcomes))
        for waiting in reversed(batch[len(outcomes) :]):
            self._waiting.put_back(waiting.tenant, waiting)
        if self._waiting:
            self._schedule()
        for waiting, (result, failure) in zip(batch, outcomes, strict=False):
            if waiting.future.done():
                continue
            if failure is None:
                waiting.future.set_result(result)
            else:
                waiting.future.set_exception(failure)


def _call(
    read: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs
) -> Callable[[sqlite3.Connection], T]:
    return lambda db: read(db, *args, **kwargs)


def _tenant_of(args: Sequence[object]) -> str:
    """The tenant that a read is for: its first argument is the tenant, or a record with one."""
    first = args[0] if args else ""
    return first if isinstance(first, str) else str(getattr(first, "tenant", ""))


def _next_batch(waiting: FairQueue[_Waiting]) -> list[_Waiting]:
    """Takes the next reads for a hop, without those whose caller has gone away."""
    batch: list[_Waiting] = []
    while waiting and len(batch) < MAX_SHARED:
        if waiting.first.future.done():
            waiting.take()
        elif not batch or not waiting.first.alone:
            batch.append(waiting.take())
            if batch[0].alone:
                break
        else:
            break
    return batch


def _read_together(db: sqlite3.Connection, calls: Sequence[Call]) -> list[Outcome]:
    """Runs the calls in one transaction, so that all of them see the same commits. Each call has an
    outcome of its own. Those that do not begin within `HOP_SECONDS` have none."""
    outcomes: list[Outcome] = []
    end = time.perf_counter() + HOP_SECONDS
    db.execute("BEGIN")
    try:
        for call in calls:
            outcomes.append(_outcome(db, call))
            if time.perf_counter() > end:
                break
        return outcomes
    finally:
        if db.in_transaction:  # an error may have ended it
            db.execute("ROLLBACK")


def _outcome(db: sqlite3.Connection, call: Call) -> Outcome:
    try:
        return _tolerant(db, call), None
    except Exception as error:  # noqa: BLE001 - the caller that waits gets it
        return None, error


def _tolerant(db: sqlite3.Connection, call: Call) -> Any:
    """Calls again with a decoder that accepts any bytes, if some text is not UTF-8.

    The decoder makes characters of such bytes that the verification of the record then refuses.
    It is not used otherwise, because it takes a call for each text.
    """
    try:
        return call(db)
    except sqlite3.OperationalError as error:
        if not str(error).startswith("Could not decode to UTF-8"):
            raise
    db.text_factory = any_text
    try:
        return call(db)
    finally:
        db.text_factory = str
