"""The one writer of a node: takes all that waits, and commits it with one call, in one round trip.

While a call is under way the next batch collects by itself. A call is a transaction of its own, so
a node that is stopped or lost in the middle of one leaves none open.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import asyncpg
import structlog

from runlane_server.core.errors import StoreUnavailable
from runlane_server.core.model import RunKey
from runlane_server.store.base import (
    Listener,
    LoggedComplete,
    RunIdTaken,
    SessionTaken,
    Stale,
    WriteObserver,
)
from runlane_server.store.paging import by_run
from runlane_server.store.postgres.connection import (
    FAILURES,
    NOTHING_WRITTEN,
    OUTCOME_UNKNOWN,
    WRITE_TIMEOUT,
    Connector,
    describe,
    is_certain,
    is_collision,
    is_refusal,
    unavailable,
)
from runlane_server.store.postgres.log import PostgresLog
from runlane_server.store.postgres.notifier import Notifier
from runlane_server.store.postgres.rows import Result, Unit, columns
from runlane_server.store.postgres.schema import SQL

if TYPE_CHECKING:
    from asyncpg.prepared_stmt import PreparedStatement

    from runlane_server.store.postgres.connection import Connection

    Commit: TypeAlias = PreparedStatement[asyncpg.Record]

log = structlog.get_logger()

MAX_BATCH = 1_000
"""How many units go into one call: bounds its length, and so everybody's wait."""

MAX_BATCH_BYTES = 8 << 20
"""How large a batch grows before it is sent; a unit that is larger goes alone."""

MAX_COLLISIONS = 10
"""How often a batch is repeated that others got in the way of."""

IDLE_SECONDS = 20.0
"""A connection that was not used for so long is tried first. Else the first write after a silent
loss would have an unknown outcome, where it was never received."""

CHECK_TIMEOUT = 5.0


class PostgresWriter:
    """Owns the write connection. Nothing is answered or told before the commit is confirmed."""

    def __init__(
        self,
        connector: Connector,
        followed: PostgresLog,
        notifier: Notifier,
        listener: Callable[[], Listener | None],
        write_observer: Callable[[], WriteObserver | None],
    ) -> None:
        self._connector = connector
        self._log = followed
        self._notifier = notifier
        self._listener = listener
        self._write_observer = write_observer
        self._took = 0.0
        self._connection: Connection | None = None
        self._commit: Commit | None = None
        self._used = 0.0
        self._pending: deque[Unit] = deque()
        self._wake = asyncio.Event()
        self._closing = False
        self._task = asyncio.create_task(self._run(), name="postgres-writer")

    async def write(self, unit: Unit) -> None:
        """Commits a unit, together with what else waits. Raises why it was refused.

        Cancelling only ends the wait.
        """
        if self._closing:
            raise StoreUnavailable("the store is closed; nothing was written")
        self._pending.append(unit)
        self._wake.set()
        # The outcome is a value, so that nothing complains where nobody waits for it any more.
        result = await unit.future
        if result is not None:
            raise result

    async def close(self) -> None:
        """Commits what waits, and ends. Writes after that are refused."""
        self._closing = True
        self._wake.set()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        batch: list[Unit] = []
        try:
            while self._pending or not self._closing:
                await self._wake.wait()
                self._wake.clear()
                while self._pending:
                    batch = _next_batch(self._pending)
                    await self._settle(batch)
        finally:
            # Only where the event loop is torn down anybody waits by now.
            for unit in (*batch, *self._pending):
                _resolve(unit, unavailable(OUTCOME_UNKNOWN))
            self._forget_connection()

    async def _settle(self, units: Sequence[Unit]) -> None:
        """Writes units, and answers each of them."""
        try:
            await self._write(units)
        except StoreUnavailable as error:
            self._note_unconfirmed(units)
            _resolve_all(units, error)
            # What is known to be committed, or may be, is told as soon as it can be read.
            self._log.wake()
        except Exception as error:
            log.exception("a write failed")
            self._forget_connection()
            self._note_unconfirmed(units)
            _resolve_all(units, unavailable(f"{OUTCOME_UNKNOWN} ({type(error).__name__})"))

    def _note_unconfirmed(self, units: Sequence[Unit]) -> None:
        if (write_observer := self._write_observer()) is not None:
            write_observer.on_unconfirmed(len(units))

    async def _write(self, units: Sequence[Unit]) -> None:
        """Writes units, without those that are refused. One round trip, and one more for each time
        that some are.

        Raises StoreUnavailable; some may be answered by then.
        """
        try:
            row = await self._call(units)
        except Exception as error:
            if not is_refusal(error):
                raise
            if len(units) == 1:
                _resolve(units[0], _why(units[0], error))
                return
            # One of them is to blame, and it is not said which.
            half = len(units) // 2
            await self._settle(units[:half])
            await self._settle(units[half:])
            return
        if not row["refused"]:
            await self._committed(units, row)
            return
        # Where there are several reasons the first one counts: what is stale is decided anew.
        refused = dict(reversed(row["refused"]))
        for n, reason in refused.items():
            _resolve(units[n], _REFUSALS[reason]())
        rest = [unit for n, unit in enumerate(units) if n not in refused]
        if rest:
            await self._write(rest)

    async def _call(self, units: Sequence[Unit]) -> Any:
        """One call of the database, repeated only where it certainly did nothing."""
        arguments = columns(units)
        for _ in range(MAX_COLLISIONS):
            commit = await self._ready()
            began = time.perf_counter()
            try:
                row = await commit.fetchrow(*arguments, timeout=WRITE_TIMEOUT)
            except FAILURES as error:
                if is_collision(error):
                    continue
                if is_refusal(error):
                    raise
                # At once: the cancel that the driver sends after a timeout must not reach a commit
                # that waits for a standby. It would end the wait, and not the commit.
                self._forget_connection()
                told = NOTHING_WRITTEN if is_certain(error) else OUTCOME_UNKNOWN
                log.warning("a write failed", error=describe(error), told=told)
                raise unavailable(told) from error
            self._took = time.perf_counter() - began
            self._used = asyncio.get_running_loop().time()
            return row
        raise unavailable(NOTHING_WRITTEN)

    async def _ready(self) -> Commit:
        """The statement that commits, on a connection that lives. Raises StoreUnavailable."""
        now = asyncio.get_running_loop().time()
        try:
            if self._connection is not None and now - self._used > IDLE_SECONDS:
                await self._check(self._connection)
            if self._connection is None or self._connection.is_closed() or self._commit is None:
                self._forget_connection()
                self._connection = await self._connector.connect()
                self._commit = await self._connection.prepare(SQL["commit_units"])
        except FAILURES as error:
            self._forget_connection()
            raise unavailable(NOTHING_WRITTEN) from error
        self._used = now
        return self._commit

    async def _check(self, connection: Connection) -> None:
        try:
            await connection.execute("SELECT 1", timeout=CHECK_TIMEOUT)
        except FAILURES:
            self._forget_connection()

    def _forget_connection(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
        self._connection = self._commit = None

    async def _committed(self, units: Sequence[Unit], row: Any) -> None:
        """Takes note of what is committed, tells it, and only then answers."""
        if (write_observer := self._write_observer()) is not None:
            write_observer.on_committed(len(units), self._took)
        for n, after in row["raised"]:
            units[n].raised = after
        position = row["first_position"]
        logged: list[LoggedComplete] = []
        for unit in units:
            for complete in unit.completes:
                logged.append(LoggedComplete(position, unit.tenant, complete))
                position += 1
        if logged:
            self._notifier.logged(logged[-1].position)
            await self._tell_log(logged)
        self._tell_runs(units)
        for unit in units:
            _resolve(unit, None)

    async def _tell_log(self, logged: Sequence[LoggedComplete]) -> None:
        try:
            await self._log.tell(logged)
        except StoreUnavailable as error:
            # It is committed, but nobody may be answered who was not told.
            raise unavailable(OUTCOME_UNKNOWN) from error

    def _tell_runs(self, units: Sequence[Unit]) -> None:
        listener = self._listener()
        if listener is None:
            return
        try:
            for unit in units:
                for run_id, events in by_run(unit.events):
                    listener.on_run_events(RunKey(unit.tenant, run_id), events)
        except Exception:
            log.exception("the listener of the store failed")


def _next_batch(pending: deque[Unit]) -> list[Unit]:
    """Takes what can be written table by table without a change of meaning.

    That is: one change of a lane and of a run, and no append to a run after a change of that run.
    """
    batch: list[Unit] = []
    lanes: set[object] = set()
    changed: set[tuple[str, str]] = set()
    size = 0
    while pending and len(batch) < MAX_BATCH:
        unit = pending[0]
        size += unit.size
        runs = {(unit.tenant, run_id) for run_id in unit.changed}
        if batch and (
            size > MAX_BATCH_BYTES
            or unit.lane in lanes
            or not changed.isdisjoint(runs)
            or (unit.tenant, unit.appended) in changed
        ):
            return batch
        if unit.lane is not None:
            lanes.add(unit.lane)
        changed |= runs
        batch.append(pending.popleft())
    return batch


_REFUSALS: dict[str, Callable[[], Exception]] = {
    "stale": lambda: Stale("the lane is not at the version that the transition was made from"),
    "fenced": lambda: Stale("the attempt is not the active one"),
    "run_id_taken": lambda: RunIdTaken("a run of that id exists already"),
    "session_taken": lambda: SessionTaken("a session of that id exists already"),
}
"""What the reasons mean that `commit_units` gives."""


def _why(unit: Unit, error: Exception) -> Exception:
    """What it means that a row of a unit was refused."""
    if not isinstance(error, asyncpg.IntegrityConstraintViolationError):
        return error
    match getattr(error, "constraint_name", None):
        case "runs_key":
            return _REFUSALS["run_id_taken"]()
        case "sessions_key":
            return _REFUSALS["session_taken" if unit.created else "stale"]()
        case _:
            return Stale("the run, or its events, are not what the transition was made from")


def _resolve_all(units: Sequence[Unit], result: Result) -> None:
    for unit in units:
        _resolve(unit, result)


def _resolve(unit: Unit, result: Result) -> None:
    if not unit.future.done():
        unit.future.set_result(result)
