"""A new id for a database that is not what it was: restored, or a standby that lagged behind."""

from __future__ import annotations

from datetime import timedelta

from runlane_server.core.errors import StartError
from runlane_server.store.postgres.connection import FAILURES, Connector, describe
from runlane_server.store.postgres.database import Database
from runlane_server.store.postgres.schema import SQL
from runlane_server.store.postgres.text import unescape

SILENT_FOR = timedelta(seconds=30)
"""After how long without a sign of life it is taken that nobody works over a database. A node gives
four within its lease."""


async def renew(database: Database) -> str:
    """Gives a store a new id; returns what is to be said of it.

    A cursor from before is refused from then on, as what follows may differ from what its holder
    was told. Raises StartError, also while nodes are at work: they would go on with the old id.
    """
    try:
        connection = await Connector(database).connect()
        try:
            if not await connection.fetchval(SQL["has_versions"]):
                raise StartError(f"renew {database.label}: there is no store")
            if nodes := await connection.fetch(SQL["nodes_at_work"], SILENT_FOR):
                names = ", ".join(sorted(unescape(node["address"]) for node in nodes))
                raise StartError(
                    f"renew {database.label}: nodes were at work within the last"
                    f" {SILENT_FOR.seconds} s ({names}); stop them, and wait for so long"
                )
            await connection.execute(SQL["renew"])
        finally:
            connection.terminate()
    except (*FAILURES, ValueError) as error:
        raise StartError(f"renew {database.label}: {describe(error)}") from error
    return f"{database.label}: has a new id; cursors from before are refused"
