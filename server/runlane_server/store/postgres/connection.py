"""Connections to the database, and the meaning of its errors.

The store sends single statements only, each a transaction of its own: a node that stops or dies
while it waits leaves no transaction open.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from runlane_server.core.errors import StoreDown, StoreUnavailable
from runlane_server.store.postgres.database import Database

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]
    _Driven = asyncpg.Connection[asyncpg.Record]
else:
    _Driven = asyncpg.Connection

CONNECT_TIMEOUT = 5.0
"""Seconds that a new connection may take, divided among the hosts of the URL: a host that does not
answer must not use up the time of the others."""

READ_TIMEOUT = 15.0
WRITE_TIMEOUT = 20.0
"""Seconds after which a connection that does not answer is abandoned. A write waits longest: the
server gives up earlier (`STATEMENT_TIMEOUT`) and reports it, so that the outcome is known."""

STATEMENT_TIMEOUT = 12.0
"""The server's limit for a statement in seconds, including the wait for locks."""

RETRY_AFTER = 1.0
"""Seconds before a caller should retry when the database is unavailable."""

NOTHING_WRITTEN = "the database could not be written to; nothing was written; repeat the call"
OUTCOME_UNKNOWN = (
    "the database did not confirm a write: outcome unknown; repeat the call with the same run id"
)
NOT_READ = "the database could not be read; repeat the call"

FAILURES = (
    OSError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    # The driver raises it for an idle connection that the server has closed.
    asyncpg.InternalClientError,
)
"""Errors that a call of the database may raise for other reasons than its arguments."""

APPLICATION = "runlane"
"""The application name of the connections."""

_SET = (
    "SELECT set_config(name, value, false) FROM unnest($1::text[], $2::text[]) AS _ (name, value)"
)

_SETTINGS = {
    "statement_timeout": f"{STATEMENT_TIMEOUT:g}s",
    "timezone": "UTC",
    # A node that disappears may leave a transaction open and rows locked. The database detects it
    # within half a minute; with the defaults of the operating system it takes hours.
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "jit": "off",
    # Every statement is a seek in an index. The planner would prefer to scan tables that were small
    # when it made the plan, or that have no statistics yet.
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
}


class _Connection(_Driven):
    """A connection that closes without a message to the server.

    The driver's pool closes expired connections in the background. On a dead connection the message
    would fail, in a task whose error nobody handles.
    """

    async def close(self, *, timeout: float | None = None) -> None:
        """Closes the connection at once."""
        self.terminate()


@dataclass(slots=True)
class _Hosts:
    """The index of the host that was the primary at the last connect."""

    primary: int = 0


@dataclass(frozen=True, slots=True)
class Connector:
    """Opens connections to a database, all with the same settings.

    `durability` is the value for synchronous_commit; None leaves it unchanged. Copies of a
    connector share `hosts`, so that one of them finds the primary for all.
    """

    database: Database
    durability: str | None = None
    hosts: _Hosts = field(default_factory=_Hosts)

    async def connect(self) -> Connection:
        """A new connection to the primary. Raises one of `FAILURES`; ValueError for a bad URL."""
        dsns = self.database.dsns
        first = self.hosts.primary
        failures: list[Exception] = []
        # The driver would try all hosts too, but within a single timeout.
        for n in (*range(first, len(dsns)), *range(first)):
            try:
                connection = await self._connect(dsns[n], CONNECT_TIMEOUT / len(dsns))
            except FAILURES as error:
                failures.append(error)
                continue
            self.hosts.primary = n
            return connection
        # One host that does not refuse may be in use by other nodes.
        raise next((it for it in failures if not is_down(it)), failures[-1])

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
            # Not at connect: PgBouncer refuses most settings there.
            await connection.execute(_SET, [*settings], [*settings.values()], timeout=timeout)
        except BaseException:
            connection.terminate()
            raise
        return connection


def _session_attrs(dsn: str) -> SessionAttribute | None:
    """Requires the primary: a replica refuses writes and lags behind."""
    return None if "target_session_attrs=" in dsn else SessionAttribute.primary


def unavailable(message: str, cause: BaseException | None = None) -> StoreUnavailable:
    """The error for callers while the database is unavailable."""
    kind = StoreDown if cause is not None and is_down(cause) else StoreUnavailable
    return kind(message, retry_after=RETRY_AFTER)


def is_down(error: BaseException) -> bool:
    """Whether an error shows that the database does not run, or is just starting or stopping."""
    return isinstance(
        error, ConnectionRefusedError | FileNotFoundError | asyncpg.CannotConnectNowError
    )


def is_refusal(error: Exception) -> bool:
    """Whether an error concerns the given rows only: others may still be written."""
    return isinstance(
        error,
        asyncpg.IntegrityConstraintViolationError
        | asyncpg.DataError
        | asyncpg.ProgramLimitExceededError
        # The driver cannot encode an argument.
        | ValueError
        | TypeError
        | OverflowError,
    )


def is_collision(error: Exception) -> bool:
    """Whether a statement was rolled back because of a concurrent one, and may be repeated."""
    return isinstance(error, asyncpg.TransactionRollbackError)


def wrote_nothing(error: Exception) -> bool:
    """Whether a statement that failed with this error has certainly written nothing.

    That is true if the server reported the error, except when an operator ended the statement: this
    may happen between the commit and its answer.
    """
    if isinstance(error, asyncpg.QueryCanceledError):
        return True
    return isinstance(error, asyncpg.PostgresError) and not isinstance(
        error, asyncpg.PostgresConnectionError | asyncpg.OperatorInterventionError
    )


def describe(error: BaseException) -> str:
    """The text of an error in one line, for the log."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
