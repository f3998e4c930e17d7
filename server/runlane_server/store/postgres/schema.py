"""Opens a database: checks it and migrates its schema. Many nodes may do so at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import structlog

from runlane_server.core.errors import SettingsError, StartError
from runlane_server.store.base import Position
from runlane_server.store.compaction import CompactedPositions
from runlane_server.store.postgres.connection import FAILURES, Connector, describe
from runlane_server.store.postgres.database import Database
from runlane_server.store.postgres.text import unescape
from runlane_server.store.sqlfiles import migrations, statements

if TYPE_CHECKING:
    from runlane_server.store.postgres.connection import Connection

log = structlog.get_logger()

SQL = statements("postgres")

OLDEST_SERVER = (14, 0)

MIGRATION_TIMEOUT = 600.0
"""Seconds that a migration may take, and the wait for another node's migration."""

STRICT_ENOUGH = frozenset({"on", "remote_apply"})
"""Values of synchronous_commit with which a confirmed commit is never lost."""


@dataclass(frozen=True, slots=True)
class OpenDatabase:
    """A database after its checks, and the state of its log."""

    connector: Connector
    store_id: bytes
    position: Position
    compacted: CompactedPositions
    node_keys: Sequence[str]


async def open_database(database: Database) -> OpenDatabase:
    """Checks the database and migrates its schema. Raises StartError.

    Nodes that start at the same time wait for each other. It takes five round trips if there is
    nothing to migrate.
    """
    connector = Connector(database)
    try:
        connection = await connector.connect()
        try:
            durability = await _check(connection, database)
            version = await _migrate(connection, database)
            row = await connection.fetchrow(SQL["state"])
            logs = await connection.fetch(SQL["tenant_logs"])
        finally:
            connection.terminate()
    except (*FAILURES, ValueError) as error:
        raise _cannot_open(database, error) from error
    if row is None:
        raise SettingsError(f"store {database.label}: its table 'store' is empty")
    log.info("store opened", store=database.label, schema=version, synchronous_commit=durability)
    connector = replace(connector, durability=durability)
    return OpenDatabase(
        connector,
        row["store_id"],
        row["position"],
        CompactedPositions({unescape(log["tenant"]): log["compacted"] for log in logs}),
        row["peer_key"].split(),
    )


_OF_SETTINGS = ("28", "3D", "42501")
"""SQLSTATE prefixes: wrong user or password, unknown database, no privilege."""


def _cannot_open(database: Database, error: Exception) -> StartError:
    message = f"store {database.label}: {describe(error)}"
    state = getattr(error, "sqlstate", None) or ""
    if isinstance(error, ValueError) or state.startswith(_OF_SETTINGS):
        return SettingsError(message)
    return StartError(message)


async def _check(connection: Connection, database: Database) -> str:
    """Returns the value for synchronous_commit. Raises StartError for an unsuitable server."""
    found = connection.get_server_version()
    if (found.major, found.minor) < OLDEST_SERVER:
        raise SettingsError(
            f"store {database.label}: PostgreSQL {found.major} is too old;"
            f" {OLDEST_SERVER[0]} is the oldest supported version"
        )
    row = await connection.fetchrow(SQL["settings"])
    assert row is not None  # noqa: S101 - it reads no table
    if row["encoding"] != "UTF8":
        raise SettingsError(
            f"store {database.label}: the encoding is {row['encoding']};"
            " create the database as UTF8"
        )
    if row["fsync"] != "on":
        log.warning("fsync is off in the database: a crash of its machine loses confirmed commits")
    # A stricter setting is left unchanged.
    return row["durability"] if row["durability"] in STRICT_ENOUGH else "on"


async def _migrate(connection: Connection, database: Database) -> int:
    """Applies the missing migrations, all or none; returns the version of the schema."""
    known = migrations("postgres")
    version = await _version(connection)
    if version < len(known):
        # Other nodes wait here and then find nothing to do. The lock ends with the connection.
        # It is taken before the transaction, which would otherwise see the tables as they were.
        await connection.execute(SQL["lock_schema"], timeout=MIGRATION_TIMEOUT)
        async with connection.transaction():
            version = await _version(connection)
            if version == 0:
                await _begin(connection, database)
            for migration in known[version:]:
                await connection.execute(migration.sql, timeout=MIGRATION_TIMEOUT)
                await connection.execute(SQL["add_version"], migration.number)
                version = migration.number
        await connection.execute(SQL["unlock_schema"])
    if version > len(known):
        raise SettingsError(
            f"store {database.label}: a newer Runlane wrote it"
            f" (schema {version}, known {len(known)})"
        )
    return version


async def _version(connection: Connection) -> int:
    """The version of the schema; 0 if there is none."""
    if not await connection.fetchval(SQL["has_versions"]):
        return 0
    version: int = await connection.fetchval(SQL["version"])
    return version


async def _begin(connection: Connection, database: Database) -> None:
    """Creates an empty schema. Raises StartError if the schema is not ours."""
    if foreign := await connection.fetchval(SQL["foreign_table"], database.schema):
        raise SettingsError(
            f"store {database.label}: the schema has a table {foreign!r} of another program;"
            " use another one with ?schema=NAME"
        )
    # CREATE SCHEMA needs a privilege that is not needed if the schema exists.
    if not await connection.fetchval(SQL["has_schema"], database.schema):
        await connection.execute(f'CREATE SCHEMA "{database.schema}"')
    await connection.execute(SQL["create_versions"])
