"""New secrets for a database: a store id after a loss of events, and a key for its nodes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from runlane_server.core.errors import StartError
from runlane_server.store.postgres.connection import FAILURES, Connector, describe
from runlane_server.store.postgres.database import Database
from runlane_server.store.postgres.schema import SQL
from runlane_server.store.postgres.text import unescape

if TYPE_CHECKING:
    from runlane_server.store.postgres.connection import Connection

SILENT_FOR = timedelta(seconds=30)
"""Time without a heartbeat after which a node counts as stopped. A node sends one every few
seconds."""


async def renew(database: Database) -> str:
    """Gives a store a new id; returns a line for the operator.

    The store then refuses older cursors, as the events after them may differ from those that their
    holders have seen. Raises StartError, also while nodes run: they would continue with the old id.
    """
    async with opened(database, "renew") as connection:
        await refuse_nodes(connection, database, "renew")
        await connection.execute(SQL["renew"])
    return f"{database.label}: the store has a new id and refuses older cursors"


async def rotate_node_key(database: Database) -> str:
    """Adds a new node key, also while nodes run, and keeps only the one before it; returns a line
    for the operator. Raises StartError.
    """
    async with opened(database, "rotate-node-key") as connection:
        await connection.execute(SQL["rotate_node_key"])
    return (
        f"{database.label}: the nodes have a new key; the one before it is valid until the next"
        " rotation"
    )


async def refuse_nodes(connection: Connection, database: Database, command: str) -> None:
    """Raises StartError if nodes use a database."""
    if nodes := await connection.fetch(SQL["nodes_at_work"], SILENT_FOR):
        names = ", ".join(sorted(unescape(node["address"]) for node in nodes))
        raise StartError(
            f"{command} {database.label}: nodes were running within the last"
            f" {SILENT_FOR.seconds} s ({names}); stop them and wait that long"
        )


@asynccontextmanager
async def opened(database: Database, command: str) -> AsyncIterator[Connection]:
    """A connection to a database with a store. Raises StartError, for failures inside too."""
    try:
        connection = await Connector(database).connect()
        try:
            if not await connection.fetchval(SQL["has_versions"]):
                raise StartError(f"{command} {database.label}: the schema has no store")
            yield connection
        finally:
            connection.terminate()
    except (*FAILURES, ValueError) as error:
        raise StartError(f"{command} {database.label}: {describe(error)}") from error
