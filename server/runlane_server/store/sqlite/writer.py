"""The only writer of a database file: groups pending units into batches.

The transaction itself, with its COMMIT, is in `transaction.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeAlias

import structlog

from runlane_server.core.errors import StoreUnavailable
from runlane_server.store.base import Listener, LoggedComplete, Position, StoreError, WriteObserver
from runlane_server.store.batching import Pacer, WriteQueue
from runlane_server.store.compaction import CompactedPositions
from runlane_server.store.fanout import (
    observe_commit,
    observe_unconfirmed,
    publish_completes,
    publish_lane,
    publish_run_events,
)
from runlane_server.store.sqlite import compact as sqlite_compact
from runlane_server.store.sqlite.connection import SqliteConnection
from runlane_server.store.sqlite.rows import Compaction, CompactionStep, Result, Unit
from runlane_server.store.sqlite.transaction import apply_units

log = structlog.get_logger()

MAX_BATCH_CHARS = 4 << 20
"""The most text in one transaction besides the output of agents, unless one unit has more: bounds
its duration."""

Pending: TypeAlias = Unit | Compaction


class Callbacks(Protocol):
    """The callbacks of a store, which may be set after the writer was made."""

    @property
    def listener(self) -> Listener | None:
        """See `Store.listener`."""

    @property
    def write_observer(self) -> WriteObserver | None:
        """See `Store.write_observer`."""

    @property
    def on_failure(self) -> Callable[[StoreError], None] | None:
        """See `Store.on_failure`."""


class SqliteWriter:
    """Owns the write connection. It answers and publishes nothing before COMMIT has returned.

    It stops at the first error of the database itself: after a failed COMMIT the rows may exist or
    not, and only a restart can find out.
    """

    def __init__(
        self,
        connection: SqliteConnection,
        position: Position,
        compacted: CompactedPositions,
        callbacks: Callbacks,
    ) -> None:
        self.position = position
        self.compacted = compacted
        self.failed: StoreError | None = None
        self._callbacks = callbacks
        self._connection = connection
        self._units: WriteQueue[Unit] = WriteQueue(MAX_BATCH_CHARS)
        self._compactions: deque[Compaction] = deque()
        self._wake = asyncio.Event()
        self._closing = False
        self._pacer = Pacer()
        self._task = asyncio.create_task(self._run(), name="sqlite-writer")

    async def write(self, unit: Pending) -> CompactionStep | None:
        """Commits a unit, in one batch with other pending ones. Raises the reason of a refusal.

        Cancelling ends the wait only.
        """
        if self.failed is not None or self._closing:
            raise unavailable(self.failed)
        if isinstance(unit, Compaction):
            self._compactions.append(unit)
        else:
            self._units.add(unit)
        self._wake.set()
        # The outcome is a value, as asyncio logs an exception that nobody retrieves.
        result = await unit.future
        if isinstance(result, Exception):
            raise result
        return result

    async def close(self) -> None:
        """Commits pending units and stops. It refuses later writes."""
        self._closing = True
        self._wake.set()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        batch: Sequence[Pending] = []
        try:
            while self._is_pending or not self._closing:
                await self._wake.wait()
                self._wake.clear()
                while self._is_pending:
                    if (delay := self._pacer.delay()) and not self._closing:
                        await asyncio.sleep(delay)
                    for batch in self._next_batches():
                        await self._commit(batch)
                        self._pacer.record(len(batch))
        except Exception as error:  # noqa: BLE001 - _fail reports it to all who wait
            self._fail(f"{_name(error)}: {error}", batch)
        except asyncio.CancelledError:
            self._fail("the server stopped during a write", batch)
            raise

    @property
    def _is_pending(self) -> bool:
        return bool(self._units or self._compactions)

    def _next_batches(self) -> Iterator[Sequence[Pending]]:
        """Takes the units of a transaction, and a compaction, which has one to itself."""
        if self._units:
            yield self._units.take()
        if self._compactions:
            yield [self._compactions.popleft()]

    async def _commit(self, batch: Sequence[Pending]) -> None:
        first = batch[0]
        if isinstance(first, Compaction):
            step = await self._connection.work(sqlite_compact.compact, first)
            for tenant, position in step.compacted.items():
                self.compacted.note(tenant, position)
            _resolve(first, step)
            return
        units = [unit for unit in batch if isinstance(unit, Unit)]
        began = time.perf_counter()
        results = await self._connection.work(apply_units, units, self.position)
        took = time.perf_counter() - began
        committed = [unit for unit, why in zip(units, results, strict=True) if why is None]
        self._publish(committed)
        if committed:
            observe_commit(self._callbacks.write_observer, len(committed), took)
        for unit, result in zip(units, results, strict=True):
            _resolve(unit, result)

    def _publish(self, committed: Sequence[Unit]) -> None:
        """Calls the listener, synchronously: a caller gets its answer after the listener."""
        logged = [
            LoggedComplete(unit.first_position + n, unit.tenant, complete)
            for unit in committed
            for n, complete in enumerate(unit.completes)
        ]
        listener = self._callbacks.listener
        if logged:
            self.position = logged[-1].position
            publish_completes(listener, logged)
        for unit in committed:
            publish_run_events(listener, unit.tenant, unit.events)
            publish_lane(listener, unit.lane_change)

    def _fail(self, message: str, batch: Sequence[Pending]) -> None:
        self.failed = StoreError(message)
        log.error("store no longer writable", reason=message)
        left = (*batch, *self._units, *self._compactions)
        observe_unconfirmed(self._callbacks.write_observer, len(left))
        for unit in left:
            _resolve(unit, unavailable(self.failed))
        self._units.clear()
        self._compactions.clear()
        if self._callbacks.on_failure is not None:
            self._callbacks.on_failure(self.failed)


def unavailable(failed: StoreError | None) -> StoreUnavailable:
    """The error for a write that was not confirmed."""
    if failed is None:
        return StoreUnavailable("the store is closed; nothing was written")
    return StoreUnavailable(
        "the store failed: outcome unknown; repeat the call with the same run id"
    )


def _resolve(unit: Pending, result: Result) -> None:
    if not unit.future.done():
        unit.future.set_result(result)


def _name(error: Exception) -> str:
    return str(getattr(error, "sqlite_errorname", type(error).__name__))
