"""How the database is connected to, and what its errors mean.

All that the store does is single statements, each a transaction of its own: whatever becomes of a
node while it waits, it leaves no transaction open.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from runlane_server.core.errors import StoreUnavailable
from runlane_server.store.postgres.database import Database

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]
    _Driven = asyncpg.Connection[asyncpg.Record]
else:
    _Driven = asyncpg.Connection

CONNECT_TIMEOUT = 5.0
"""Seconds that a new connection may take. Each host of several has its share of them: one that is
gone without a word must not keep anybody from the others."""

READ_TIMEOUT = 15.0
WRITE_TIMEOUT = 20.0
"""Seconds after which a connection is given up that does not answer. A write has the longest, for
the server gives up before that (`STATEMENT_TIMEOUT`), and says so: the outcome is known then."""

STATEMENT_TIMEOUT = 12.0
"""Seconds that the server takes for a statement, waiting for locks included."""

RETRY_AFTER = 1.0
"""Seconds after which a caller may come back who was told that the database is not there."""

NOTHING_WRITTEN = "the database could not be written to; nothing was written; repeat the call"
OUTCOME_UNKNOWN = (
    "the database did not confirm a write: outcome unknown; repeat the call with the same run id"
)
NOT_READ = "the database could not be read; repeat the call"

FAILURES = (
    OSError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    # A connection that the server has ended while nobody used it may be in no state that is known.
    asyncpg.InternalClientError,
)
"""All that a call of the database may raise beside what its arguments are to blame for."""

APPLICATION = "runlane"
"""What connections are called in the database."""

_SET = (
    "SELECT set_config(name, value, false) FROM unnest($1::text[], $2::text[]) AS _ (name, value)"
)

_SETTINGS = {
    "statement_timeout": f"{STATEMENT_TIMEOUT:g}s",
    "timezone": "UTC",
    # A node that is gone without a word may leave a transaction open, and rows locked: the database
    # finds that out within half a minute, where its system would take hours.
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "jit": "off",
    # Every statement is a seek in an index. Where the tables were small when a plan was made, or
    # nobody has counted their rows yet, the planner would prefer to read them whole.
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
}


class _Connection(_Driven):
    """A connection that is left without a word.

    The driver's pool closes in the background what it has expired. On a line that is dead the
    server cannot be told of it, and that error would be nobody's.
    """

    async def close(self, *, timeout: float | None = None) -> None:
        """Ends it at once."""
        self.terminate()


@dataclass(slots=True)
class _Hosts:
    """Which of the hosts was the primary when last somebody asked."""

    primary: int = 0


@dataclass(frozen=True, slots=True)
class Connector:
    """Connects to a database, always in the same way.

    `durability` is what synchronous_commit is set to; it is left as it is without one. `hosts` is
    shared by those that connect to the same database: what one finds out, all know.
    """

    database: Database
    durability: str | None = None
    hosts: _Hosts = field(default_factory=_Hosts)

    async def connect(self) -> Connection:
        """A new connection to the primary. Raises one of `FAILURES`; ValueError for a bad URL."""
        dsns = self.database.dsns
        first = self.hosts.primary
        failures: list[Exception] = []
        # The driver would try one after another too, but within one timeout for all.
        for n in (*range(first, len(dsns)), *range(first)):
            try:
                connection = await self._connect(dsns[n], CONNECT_TIMEOUT / len(dsns))
            except FAILURES as error:
                failures.append(error)
                continue
            self.hosts.primary = n
            return connection
        raise failures[-1]

    async def _connect(self, dsn: str, timeout: float) -> Connection:
        settings = _SETTINGS | {"search_path": f'"{self.database.schema}"'}
        if self.durability is not None:
            settings["synchronous_commit"] = self.durability
        connection = await asyncpg.connect(
            dsn,
            timeout=timeout,
            command_timeout=READ_TIMEOUT,
            connection_class=_Connection,
            target_session_attrs=_session_attrs(dsn),
            server_settings={"application_name": APPLICATION},
        )
        try:
            # Not as the connection is made: a PgBouncer lets hardly any setting through there.
            await connection.execute(_SET, [*settings], [*settings.values()], timeout=timeout)
        except BaseException:
            connection.terminate()
            raise
        return connection


def _session_attrs(dsn: str) -> SessionAttribute | None:
    """A replica is of no use: it cannot be written to, and lags behind."""
    return None if "target_session_attrs=" in dsn else SessionAttribute.primary


def unavailable(message: str) -> StoreUnavailable:
    """What a caller is told of a database in trouble."""
    return StoreUnavailable(message, retry_after=RETRY_AFTER)


def is_refusal(error: Exception) -> bool:
    """Whether an error is that of the rows that were given: they cannot be written, others may."""
    return isinstance(
        error,
        asyncpg.IntegrityConstraintViolationError
        | asyncpg.DataError
        | asyncpg.ProgramLimitExceededError
        # What the driver says of arguments that it cannot send.
        | ValueError
        | TypeError
        | OverflowError,
    )


def is_collision(error: Exception) -> bool:
    """Whether a statement was rolled back as it met another one, and may be repeated as it is."""
    return isinstance(error, asyncpg.TransactionRollbackError)


def is_certain(error: Exception) -> bool:
    """Whether a statement that failed with that has certainly written nothing.

    So it is where the server said why, except where it was told to end: that may have been between
    the commit and its answer.
    """
    if isinstance(error, asyncpg.QueryCanceledError):
        return True
    return isinstance(error, asyncpg.PostgresError) and not isinstance(
        error, asyncpg.PostgresConnectionError | asyncpg.OperatorInterventionError
    )


def describe(error: BaseException) -> str:
    """An error in one line, for the log."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
