"""How a database is opened: checked, and its schema brought up to date, by many nodes at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import structlog

from runlane_server.core.errors import StartError
from runlane_server.store.base import Position
from runlane_server.store.postgres.connection import FAILURES, Connector, describe
from runlane_server.store.postgres.database import Database
from runlane_server.store.sqlfiles import migrations, statements

if TYPE_CHECKING:
    from runlane_server.store.postgres.connection import Connection

log = structlog.get_logger()

SQL = statements("postgres")

OLDEST_SERVER = (14, 0)

MIGRATION_TIMEOUT = 600.0
"""Seconds that a migration may take, or the wait for that of another node."""

STRICT_ENOUGH = frozenset({"on", "remote_apply"})
"""Values of synchronous_commit with which a commit that was answered is never lost."""


@dataclass(frozen=True, slots=True)
class Opened:
    """An open database, and what is known of it."""

    connector: Connector
    store_id: bytes
    position: Position
    compacted: Position
    peer_key: str


async def open_database(database: Database) -> Opened:
    """Checks the database, and brings its schema up to date. Raises StartError.

    All nodes that start meanwhile wait for one another. A schema that is up to date costs five
    round trips.
    """
    connector = Connector(database)
    try:
        connection = await connector.connect()
        try:
            durability = await _check(connection, database)
            version = await _migrate(connection, database)
            row = await connection.fetchrow(SQL["state"])
        finally:
            connection.terminate()
    except (*FAILURES, ValueError) as error:
        raise StartError(f"store {database.label}: {describe(error)}") from error
    if row is None:
        raise StartError(f"store {database.label}: its table 'store' is empty")
    log.info("store opened", store=database.label, schema=version, synchronous_commit=durability)
    connector = replace(connector, durability=durability)
    return Opened(connector, row["store_id"], row["position"], row["compacted"], row["peer_key"])


async def _check(connection: Connection, database: Database) -> str:
    """Refuses a server that cannot keep a store; returns which synchronous_commit to use."""
    found = connection.get_server_version()
    if (found.major, found.minor) < OLDEST_SERVER:
        raise StartError(
            f"store {database.label}: is PostgreSQL {found.major}; {OLDEST_SERVER[0]} is the oldest"
            " that will do"
        )
    row = await connection.fetchrow(SQL["settings"])
    assert row is not None  # noqa: S101 - it reads no table
    if row["encoding"] != "UTF8":
        raise StartError(
            f"store {database.label}: its encoding is {row['encoding']}; it has to be UTF8"
        )
    if row["fsync"] != "on":
        log.warning("fsync is off in the database: what it confirms is lost if its machine fails")
    # What is stricter than it has to be is left as it is.
    return row["durability"] if row["durability"] in STRICT_ENOUGH else "on"


async def _migrate(connection: Connection, database: Database) -> int:
    """Applies the migrations that are missing, all or none; returns the version."""
    known = migrations("postgres")
    version = await _version(connection)
    if version < len(known):
        # Others wait here, and find it done. The lock ends with the connection. It is not taken
        # within the transaction, which would go on with the names that there were before the wait.
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
        raise StartError(
            f"store {database.label}: was written by a newer Runlane"
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
    """Makes a schema with nothing in it. Refuses one that is not ours."""
    if foreign := await connection.fetchval(SQL["foreign_table"], database.schema):
        raise StartError(
            f"store {database.label}: has a table {foreign!r} of some other program;"
            " name another schema with ?schema=NAME"
        )
    # To create one needs a right that a schema which is there makes unnecessary.
    if not await connection.fetchval(SQL["has_schema"], database.schema):
        await connection.execute(f'CREATE SCHEMA "{database.schema}"')
    await connection.execute(SQL["create_versions"])
