"""A new store id for a database that has lost events: by a restore, or a standby that lagged."""

from __future__ import annotations

from datetime import timedelta

from runlane_server.core.errors import StartError
from runlane_server.store.postgres.connection import FAILURES, Connector, describe
from runlane_server.store.postgres.database import Database
from runlane_server.store.postgres.schema import SQL
from runlane_server.store.postgres.text import unescape

SILENT_FOR = timedelta(seconds=30)
"""Time without a heartbeat after which a node counts as stopped. A node sends four within its
lease."""


async def renew(database: Database) -> str:
    """Gives a store a new id; returns a line for the operator.

    The store then refuses older cursors, as the events after them may differ from those that their
    holders have seen. Raises StartError, also while nodes run: they would continue with the old id.
    """
    try:
        connection = await Connector(database).connect()
        try:
            if not await connection.fetchval(SQL["has_versions"]):
                raise StartError(f"renew {database.label}: the schema has no store")
            if nodes := await connection.fetch(SQL["nodes_at_work"], SILENT_FOR):
                names = ", ".join(sorted(unescape(node["address"]) for node in nodes))
                raise StartError(
                    f"renew {database.label}: nodes were running within the last"
                    f" {SILENT_FOR.seconds} s ({names}); stop them and wait that long"
                )
            await connection.execute(SQL["renew"])
        finally:
            connection.terminate()
    except (*FAILURES, ValueError) as error:
        raise StartError(f"renew {database.label}: {describe(error)}") from error
    return f"{database.label}: the store has a new id and refuses older cursors"
