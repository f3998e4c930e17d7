"""The one writer of a database file: takes all that waits, and commits it as one transaction."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import structlog

from runlane_server.core.errors import StoreUnavailable
from runlane_server.core.model import RunKey
from runlane_server.store.base import Listener, LoggedComplete, Position, StoreError, WriteObserver
from runlane_server.store.batching import Pace
from runlane_server.store.paging import by_run
from runlane_server.store.sqlite import apply as sqlite_apply
from runlane_server.store.sqlite import compact as sqlite_compact
from runlane_server.store.sqlite.connection import SqliteConnection
from runlane_server.store.sqlite.rows import Compaction, Removed, Result, Unit

log = structlog.get_logger()

MAX_BATCH = 1_000
"""How many units go into one transaction: bounds its length, and so everybody's wait."""

Pending: TypeAlias = Unit | Compaction


class Audience(Protocol):
    """Who is told: the store, as far as the writer needs to know it."""

    @property
    def listener(self) -> Listener | None:
        """Who is told of commits."""

    @property
    def write_observer(self) -> WriteObserver | None:
        """Who is told how writing goes."""

    @property
    def on_failure(self) -> Callable[[StoreError], None] | None:
        """Who is told of the end."""


class SqliteWriter:
    """Owns the write connection. Nothing is answered or told before COMMIT has returned.

    The first error that is the database's own is the last thing the writer does: after a failed
    COMMIT the rows may be there or not, and only a restart can tell.
    """

    def __init__(
        self,
        connection: SqliteConnection,
        position: Position,
        compacted: Position,
        audience: Audience,
    ) -> None:
        self.position = position
        self.compacted = compacted
        self.failed: StoreError | None = None
        self._audience = audience
        self._connection = connection
        self._pending: deque[Pending] = deque()
        self._wake = asyncio.Event()
        self._closing = False
        self._pace = Pace()
        self._task = asyncio.create_task(self._run(), name="sqlite-writer")

    async def write(self, unit: Pending) -> Removed | None:
        """Commits a unit, together with what else waits. Raises why it was refused.

        Cancelling only ends the wait.
        """
        if self.failed is not None or self._closing:
            raise unavailable(self.failed)
        self._pending.append(unit)
        self._wake.set()
        # The outcome is a value, so that nothing complains where nobody waits for it any more.
        result = await unit.future
        if isinstance(result, Exception):
            raise result
        return result

    async def close(self) -> None:
        """Commits what waits, and ends. Writes after that are refused."""
        self._closing = True
        self._wake.set()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        batch: list[Pending] = []
        try:
            while self._pending or not self._closing:
                await self._wake.wait()
                self._wake.clear()
                while self._pending:
                    if (pause := self._pace.pause()) and not self._closing:
                        await asyncio.sleep(pause)
                    batch = _next_batch(self._pending)
                    await self._commit(batch)
                    self._pace.went(len(batch))
        except Exception as error:  # noqa: BLE001 - _fail tells everybody who has to know
            self._fail(f"{_name(error)}: {error}", batch)
        except asyncio.CancelledError:
            self._fail("the server was torn down", batch)
            raise

    async def _commit(self, batch: Sequence[Pending]) -> None:
        first = batch[0]
        if isinstance(first, Compaction):
            removed = await self._connection.work(sqlite_compact.compact, first)
            self.compacted = removed.last or self.compacted
            _resolve(first, removed)
            return
        units = [unit for unit in batch if isinstance(unit, Unit)]
        began = time.perf_counter()
        results = await self._connection.work(sqlite_apply.apply, units, self.position)
        took = time.perf_counter() - began
        committed = [unit for unit, why in zip(units, results, strict=True) if why is None]
        self._tell(committed)
        if committed and (write_observer := self._audience.write_observer) is not None:
            write_observer.on_committed(len(committed), took)
        for unit, result in zip(units, results, strict=True):
            _resolve(unit, result)

    def _tell(self, committed: Sequence[Unit]) -> None:
        """Tells the listener, synchronously: whoever is answered next finds it told."""
        logged = [
            LoggedComplete(unit.first_position + n, unit.tenant, complete)
            for unit in committed
            for n, complete in enumerate(unit.completes)
        ]
        if logged:
            self.position = logged[-1].position
        listener = self._audience.listener
        if listener is None:
            return
        try:
            if logged:
                listener.on_completes(logged)
            for unit in committed:
                for run_id, events in by_run(unit.events):
                    listener.on_run_events(RunKey(unit.tenant, run_id), events)
        except Exception:
            # It is committed, whatever the listener makes of it.
            log.exception("the listener of the store failed")

    def _fail(self, message: str, batch: Sequence[Pending]) -> None:
        self.failed = StoreError(message)
        log.error("the store cannot be written to any more", reason=message)
        left = (*batch, *self._pending)
        if self._audience.write_observer is not None:
            self._audience.write_observer.on_unconfirmed(len(left))
        for unit in left:
            _resolve(unit, unavailable(self.failed))
        self._pending.clear()
        if self._audience.on_failure is not None:
            self._audience.on_failure(self.failed)


def unavailable(failed: StoreError | None) -> StoreUnavailable:
    """What a caller is told when a write was not confirmed."""
    if failed is None:
        return StoreUnavailable("the store is closed; nothing was written")
    return StoreUnavailable(
        "the store failed: outcome unknown; repeat the call with the same run id"
    )


def _next_batch(pending: deque[Pending]) -> list[Pending]:
    """Takes what can go into one transaction table by table without a change of meaning.

    That is: one change of a lane, and no append to a run after a change of that run.
    """
    batch: list[Pending] = []
    lanes: set[object] = set()
    changed: set[tuple[str, str]] = set()
    while pending and len(batch) < MAX_BATCH:
        unit = pending[0]
        if isinstance(unit, Compaction):
            return batch or [pending.popleft()]
        if unit.lane in lanes:
            return batch
        if unit.appended is not None and (unit.tenant, unit.appended) in changed:
            return batch
        if unit.lane is not None:
            lanes.add(unit.lane)
        for run_id in unit.changed:
            changed.add((unit.tenant, run_id))
        batch.append(pending.popleft())
    return batch


def _resolve(unit: Pending, result: Result) -> None:
    if not unit.future.done():
        unit.future.set_result(result)


def _name(error: Exception) -> str:
    return str(getattr(error, "sqlite_errorname", type(error).__name__))
