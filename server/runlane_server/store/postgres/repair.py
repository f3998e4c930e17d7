"""Repairs the damaged records of a database that no node uses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from runlane_server.core.model import RunKey, SessionKey
from runlane_server.store.codec import RUN_COMPLETE
from runlane_server.store.corrupt import is_corrupt
from runlane_server.store.postgres import queries
from runlane_server.store.postgres.check import READS
from runlane_server.store.postgres.database import Database
from runlane_server.store.postgres.renew import opened, refuse_nodes
from runlane_server.store.postgres.schema import SQL
from runlane_server.store.postgres.store import PostgresStore
from runlane_server.store.postgres.text import unescape
from runlane_server.store.repair import (
    CORRUPT_KIND,
    CORRUPT_PROMPT,
    EMPTY_BODY,
    is_damaged_row,
    message_values,
    name_of,
    remove_sessions,
    terminal_body,
    time_of,
)

if TYPE_CHECKING:
    from runlane_server.store.postgres.connection import Connection


async def repair(database: Database) -> list[str]:
    """Repairs a database; returns a line for each change. Raises StartError, also while nodes run.

    The records are replaced in one transaction; then damaged sessions are removed one by one.
    """
    async with PostgresStore(database):
        pass  # it migrates an older schema
    async with opened(database, "repair") as connection:
        await refuse_nodes(connection, database, "repair")
        async with connection.transaction():
            sessions = {
                SessionKey(unescape(row["tenant"]), unescape(row["session_id"]))
                for table in ("sessions", "runs", "input_requests")
                for row in await _damaged(connection, table)
            }
            lines = [
                await replace(connection, row)
                for table, replace in _REPLACE.items()
                for row in await _damaged(connection, table)
            ]
    if sessions:
        async with PostgresStore(database) as store:
            lines += await remove_sessions(store, sorted(sessions))
    return lines


async def _damaged(connection: Connection, table: str) -> list[Any]:
    read = READS[table]
    statement = f"SELECT ctid::text AS place, *, 0 AS last_event_index FROM {table}"  # noqa: S608 - a constant
    return [
        row
        async for row in connection.cursor(statement)
        if await is_damaged_row(lambda row=row: read(connection, row))  # type: ignore[misc]
    ]


async def _message(connection: Connection, row: Any) -> str:
    await connection.execute(
        "UPDATE messages SET role = $2, finish_reason = $3, model = $4, created_at = $5, parts = $6"
        " WHERE ctid = $1::text::tid",
        row["place"],
        *message_values(row),
    )
    await connection.execute(SQL["recount_stored_bytes"], row["tenant"], row["session_id"])
    return f"{name_of('message', row['tenant'], row['message_id'])} was replaced"


async def _copied_message(connection: Connection, row: Any) -> str:
    copy_id, *_ = place = (row["copy_id"], row["turn"], row["ordinal"])
    await connection.execute(
        "UPDATE copied_messages SET role = $4, finish_reason = $5, model = $6, created_at = $7,"
        " parts = $8 WHERE copy_id = $1 AND turn = $2 AND ordinal = $3",
        *(*place, *message_values(row)),
    )
    if await is_damaged_row(lambda: READS["copied_messages"](connection, row)):
        # What is left is the prompt, which belongs to the message itself.
        await connection.execute(
            "UPDATE copied_messages SET prompt = $4, attachments = 0"
            " WHERE copy_id = $1 AND turn = $2 AND ordinal = $3",
            *(*place, CORRUPT_PROMPT),
        )
        await connection.execute(
            "DELETE FROM copied_attachments WHERE copy_id = $1 AND turn = $2 AND ordinal = $3",
            *place,
        )
    forks: Any = await connection.fetch(
        "SELECT tenant, session_id FROM sessions WHERE copy_id = $1", copy_id
    )
    for fork in forks:
        await connection.execute(SQL["recount_stored_bytes"], *fork)
    return f"{name_of('message', f'copy {copy_id}', row['message_id'])} was replaced"


async def _run_event(connection: Connection, row: Any) -> str:
    is_end = await connection.fetchval(SQL["is_end"], row["tenant"], row["run_id"], row["idx"])
    kind, body = (RUN_COMPLETE, None) if is_end else (CORRUPT_KIND, EMPTY_BODY)
    await connection.execute(
        "UPDATE run_events SET at = $2, kind = $3, body = $4 WHERE ctid = $1::text::tid",
        *(row["place"], time_of(row["at"]), kind, body),
    )
    return f"{name_of('event', row['tenant'], row['run_id'], row['idx'])} was replaced"


async def _logged(connection: Connection, row: Any) -> str:
    found: Any = await connection.fetchrow(SQL["run"], row["tenant"], row["run_id"])
    key = RunKey(unescape(row["tenant"]), unescape(row["run_id"]))
    run = None if found is None else queries.run(key.tenant, found)
    plain = {**row, "session_id": unescape(row["session_id"]), "run_id": key.run_id}
    body = terminal_body(plain, None if run is None or is_corrupt(run) else run)
    await connection.execute(
        "UPDATE events SET body = $2 WHERE ctid = $1::text::tid", row["place"], body
    )
    return f"{name_of('terminal event of run', *key)} was replaced"


_REPLACE: Mapping[str, Callable[[Connection, Any], Awaitable[str]]] = MappingProxyType(
    {
        "messages": _message,
        "copied_messages": _copied_message,
        "run_events": _run_event,
        "events": _logged,
    }
)
"""How the damaged rows of a table are replaced."""
