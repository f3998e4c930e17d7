"""Checks a database: that every row can be read, and that its lanes, runs, transcripts and events
agree. It reads one snapshot, while nodes may work."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from runlane_server.core.errors import CorruptRecord, StartError
from runlane_server.core.model import Prompt, RunKey
from runlane_server.store.codec import LARGE_CHARS
from runlane_server.store.corrupt import collecting, corrupt_complete
from runlane_server.store.findings import Counts, Findings, first_lines
from runlane_server.store.inputs import input_from
from runlane_server.store.postgres import queries
from runlane_server.store.postgres.connection import FAILURES, Connector, describe
from runlane_server.store.postgres.database import Database
from runlane_server.store.postgres.schema import SQL
from runlane_server.store.postgres.text import unescape
from runlane_server.store.records import event_from, message_from, run_from
from runlane_server.store.sqlfiles import statements

if TYPE_CHECKING:
    from runlane_server.store.postgres.connection import Connection

CHECKS = statements("postgres", "checks")

PAGE_ROWS = 500
"""Rows of a table that are read at a time."""

_COUNTS = """
SELECT
    (SELECT count(*) FROM sessions WHERE created_no > 0) AS sessions,
    (SELECT count(*) FROM runs WHERE run_no > 0) AS runs,
    (SELECT count(*) FROM events) AS events
"""


async def check(database: Database) -> Findings:
    """Reads one snapshot of a database; nodes may use it at the same time. Raises StartError."""
    try:
        connection = await Connector(database).connect()
        try:
            if not await connection.fetchval(SQL["has_versions"]):
                raise StartError(f"store {database.label}: the schema has no store")
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                return await _check(connection)
        finally:
            connection.terminate()
    except (*FAILURES, ValueError) as error:
        raise StartError(f"store {database.label}: {describe(error)}") from error


async def _check(connection: Connection) -> Findings:
    problems: list[str] = []
    for table, read in READS.items():
        with collecting() as lines:
            statement = f"SELECT *, 0 AS last_event_index FROM {table}"  # noqa: S608 - a constant
            async for row in connection.cursor(statement, prefetch=PAGE_ROWS):
                with suppress(CorruptRecord):  # it is collected
                    await read(connection, row)
        problems += first_lines("records", dict.fromkeys(lines))
    for name, sql in CHECKS.items():
        problems += first_lines(name, [row[0] for row in await connection.fetch(sql, timeout=None)])
    if problems:
        return Findings(tuple(problems), None)
    found: Any = await connection.fetchrow(_COUNTS)
    return Findings((), Counts(*found))


async def _read_session(connection: Connection, row: Any) -> None:
    queries.session(row["tenant"], row)
    key = queries.key_of(row)
    rows: Any = await connection.fetch(SQL["lane"], row["tenant"], row["session_id"])
    queries.lane(key, rows)


async def _read_run(connection: Connection, row: Any) -> None:
    run_from(row["tenant"], row, unescape)
    prompt: Any = await connection.fetchrow(SQL["prompt"], row["tenant"], row["run_id"])
    if prompt is not None:
        queries.prompt(RunKey(row["tenant"], row["run_id"]), prompt)


async def _read_message(connection: Connection, row: Any) -> None:
    # Its prompt is read with its run.
    kept: dict[tuple[int, int], str] = {}
    if len(row["parts"] or "") > LARGE_CHARS:
        rows: Any = await connection.fetch(SQL["kept_parts"], row["tenant"], row["run_id"])
        kept = {(it["attempt"], it["n"]): it["part"] for it in rows}
    message_from(
        row["tenant"],
        row,
        unescape,
        lambda: Prompt(""),
        lambda place: kept.get((place.attempt, place.number)),
    )


async def _read_copied(connection: Connection, row: Any) -> None:
    # The next one after the place before it.
    place = (row["copy_id"], row["turn"], row["ordinal"] - 1)
    found: Any = await connection.fetchrow(SQL["copied_messages"], *place, 1, 0, None)
    queries.message(f"copy {row['copy_id']}", found)


async def _read_event(_: Connection, row: Any) -> None:
    end = corrupt_complete("", "")
    event_from(RunKey(row["tenant"], row["run_id"]), row, lambda: end)


async def _read_logged(_: Connection, row: Any) -> None:
    queries.logged(row)


async def _read_input(_: Connection, row: Any) -> None:
    input_from(row["tenant"], row, unescape)


READS: Mapping[str, Callable[[Connection, Any], Awaitable[None]]] = MappingProxyType(
    {
        "sessions": _read_session,
        "runs": _read_run,
        "messages": _read_message,
        "copied_messages": _read_copied,
        "run_events": _read_event,
        "events": _read_logged,
        "input_requests": _read_input,
    }
)
"""How the rows of a table are read. Prompts and attachments are read with their runs."""
