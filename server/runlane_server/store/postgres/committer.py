"""Commits batches of units over one connection, one call and round trip each.

Each call is a transaction of its own, so a node that stops or dies during a call leaves no
transaction open.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import asyncpg
import structlog

from runlane_server.core.errors import StoreUnavailable
from runlane_server.store.base import (
    Listener,
    LoggedComplete,
    RunIdTaken,
    SessionTaken,
    Stale,
    WriteObserver,
)
from runlane_server.store.fanout import (
    observe_commit,
    observe_unconfirmed,
    publish_lane,
    publish_run_events,
)
from runlane_server.store.postgres.connection import (
    FAILURES,
    NOTHING_WRITTEN,
    OUTCOME_UNKNOWN,
    WRITE_TIMEOUT,
    Connector,
    describe,
    is_collision,
    is_refusal,
    unavailable,
    wrote_nothing,
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

MAX_COLLISIONS = 10
"""The most attempts of a batch that collides with the transactions of other nodes."""

IDLE_SECONDS = 20.0
"""Seconds after which an idle connection is checked before it is used. Otherwise the first write
after a silent loss would have an unknown outcome, although the database never received it."""

CHECK_TIMEOUT = 5.0


class Committer:
    """Owns a connection. Answers and publishes nothing before the commit is confirmed."""

    def __init__(
        self,
        connector: Connector,
        log_follower: PostgresLog,
        notifier: Notifier,
        listener: Callable[[], Listener | None],
        write_observer: Callable[[], WriteObserver | None],
    ) -> None:
        self._connector = connector
        self._log = log_follower
        self._notifier = notifier
        self._listener = listener
        self._write_observer = write_observer
        self._seconds = 0.0
        self._connection: Connection | None = None
        self._commit: Commit | None = None
        self._used = 0.0

    def close(self) -> None:
        """Closes the connection."""
        self._drop_connection()

    async def settle(self, units: Sequence[Unit]) -> None:
        """Writes units and answers their callers. It raises nothing."""
        try:
            await self._write(units)
        except StoreUnavailable as error:
            self._note_unconfirmed(units)
            _resolve_all(units, error)
            # The log publishes what was committed, as soon as it can be read.
            self._log.wake()
        except Exception as error:
            log.exception("write failed")
            self._drop_connection()
            self._note_unconfirmed(units)
            _resolve_all(units, unavailable(f"{OUTCOME_UNKNOWN} ({type(error).__name__})"))

    def _note_unconfirmed(self, units: Sequence[Unit]) -> None:
        observe_unconfirmed(self._write_observer(), len(units))

    async def _write(self, units: Sequence[Unit]) -> None:
        """Writes units, except those that are refused: one round trip, and one more after each
        refusal.

        Raises StoreUnavailable; some of the units may already be answered.
        """
        try:
            row = await self._call(units)
        except StoreUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - any other error is one of a unit
            if len(units) == 1:
                _resolve(units[0], _refusal(units[0], error))
                return
            # Nothing says which unit caused the error: bisect.
            half = len(units) // 2
            await self.settle(units[:half])
            await self.settle(units[half:])
            return
        if not row["refused"]:
            await self._finish(units, row)
            return
        # Of several reasons the first counts: a caller whose lane is stale decides again anyway.
        refused = dict(reversed(row["refused"]))
        for n, reason in refused.items():
            _resolve(units[n], _REFUSALS[reason]())
        rest = [unit for n, unit in enumerate(units) if n not in refused]
        if rest:
            await self._write(rest)

    async def _call(self, units: Sequence[Unit]) -> Any:
        """One call of the database. It is repeated only if it certainly wrote nothing.

        Raises StoreUnavailable for a failure of the database. Any other error concerns the units:
        the database refused a row, or a row could not be encoded.
        """
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
                # that waits for a standby. It would end the wait and not the commit.
                self._drop_connection()
                answer = NOTHING_WRITTEN if wrote_nothing(error) else OUTCOME_UNKNOWN
                log.warning("write failed", error=describe(error), answer=answer)
                raise unavailable(answer) from error
            except Exception as error:
                if not is_refusal(error):
                    # The state of the driver is unknown.
                    self._drop_connection()
                raise
            self._seconds = time.perf_counter() - began
            self._used = asyncio.get_running_loop().time()
            return row
        raise unavailable(NOTHING_WRITTEN)

    async def _ready(self) -> Commit:
        """The prepared statement that commits, on a live connection. Raises StoreUnavailable."""
        now = asyncio.get_running_loop().time()
        try:
            if self._connection is not None and now - self._used > IDLE_SECONDS:
                await self._check(self._connection)
            if self._connection is None or self._connection.is_closed() or self._commit is None:
                self._drop_connection()
                self._connection = await self._connector.connect()
                self._commit = await self._connection.prepare(SQL["commit_units"])
        except FAILURES as error:
            self._drop_connection()
            raise unavailable(NOTHING_WRITTEN) from error
        self._used = now
        return self._commit

    async def _check(self, connection: Connection) -> None:
        try:
            await connection.execute("SELECT 1", timeout=CHECK_TIMEOUT)
        except FAILURES:
            self._drop_connection()

    def _drop_connection(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
        self._connection = self._commit = None

    async def _finish(self, units: Sequence[Unit], row: Any) -> None:
        """Records and publishes a commit, and only then answers the callers."""
        observe_commit(self._write_observer(), len(units), self._seconds)
        for n, versions in row["raised"]:
            units[n].versions_skipped = versions
        position = row["first_position"]
        logged: list[LoggedComplete] = []
        for unit in units:
            for complete in unit.completes:
                logged.append(LoggedComplete(position, unit.tenant, complete))
                position += 1
        if logged:
            self._notifier.announce_log(logged[-1].position)
            try:
                await self._log.publish(logged)
            except StoreUnavailable as error:
                # The units are committed, but a caller may not be answered before the listener.
                raise unavailable(OUTCOME_UNKNOWN) from error
        listener = self._listener()
        for unit in units:
            publish_run_events(listener, unit.tenant, unit.events)
            publish_lane(listener, unit.committed_change)
        for unit in units:
            _resolve(unit, None)


_REFUSALS: dict[str, Callable[[], Exception]] = {
    "stale": Stale.lane,
    "fenced": Stale.attempt,
    "run_id_taken": RunIdTaken,
    "session_taken": SessionTaken,
}
"""The errors for the reasons that `commit_units` returns."""


def _refusal(unit: Unit, error: Exception) -> Exception:
    """The error of a unit after the database refused one of its rows."""
    if not isinstance(error, asyncpg.IntegrityConstraintViolationError):
        return error
    match getattr(error, "constraint_name", None):
        case "runs_key":
            return _REFUSALS["run_id_taken"]()
        case "sessions_key":
            return _REFUSALS["session_taken" if unit.created else "stale"]()
        case _:
            return Stale.run()


def give_up(units: Iterable[Unit]) -> None:
    """Answers callers whose units nobody will settle: the outcome is unknown."""
    _resolve_all(units, unavailable(OUTCOME_UNKNOWN))


def _resolve_all(units: Iterable[Unit], result: Result) -> None:
    for unit in units:
        _resolve(unit, result)


def _resolve(unit: Unit, result: Result) -> None:
    if not unit.future.done():
        unit.future.set_result(result)
