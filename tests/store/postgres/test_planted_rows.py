"""A damaged row of a PostgreSQL database, of every kind in every column, harms no other session."""

# ruff: noqa: S608 - all names and values are constants of this file

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import asyncpg
import pytest

from runlane_server.store.open import StoreUrl, open_store
from store.planting import BAD, GOOD, lists, play, view

if TYPE_CHECKING:
    from support.postgres import Connection

TABLES = ("sessions", "runs", "prompts", "attachments", "messages", "run_events", "events")

VALUES = {
    "text": (
        "'word'",
        "''",
        "'{}'",
        "'[1,2]'",
        "E'a\\x01b'",
        '\'[["video","x"]]\'',
        "'[[\"text\",5]]'",
        '\'[["text","\\ud800"]]\'',
        "'{\"a\":1}'",
        "repeat('[', 100000)",
        "repeat('x', 5 << 20)",
    ),
    "bigint": ("-1", "9223372036854775807", "4294967296"),
    "integer": ("-1", "2147483647"),
    "bytea": ("'\\xfffe'", "''"),
    "boolean": ("true", "false"),
}
"""Values that the types of PostgreSQL permit, as SQL."""


async def damages(beside: Connection, table: str) -> AsyncIterator[tuple[str, str]]:
    """Damages the rows of the bad session, one column and value at a time, and repairs them."""
    columns = await beside.fetch(
        "SELECT column_name AS name, data_type AS type FROM information_schema.columns"
        " WHERE table_schema = current_schema() AND table_name = $1"
        " AND is_generated = 'NEVER' AND identity_generation IS DISTINCT FROM 'ALWAYS'",
        table,
    )
    owner = "session_id" if any(row["name"] == "session_id" for row in columns) else "run_id"
    bad = f"{owner} LIKE '{BAD}%'"
    await beside.execute(f"CREATE TABLE kept AS SELECT * FROM {table} WHERE {bad}")
    for row in columns:
        for value in ("NULL", *VALUES.get(row["type"], ())):
            update = f"UPDATE {table} SET {row['name']} = {value} WHERE {bad}"
            try:
                await beside.execute(update)
            except asyncpg.PostgresError:  # a constraint forbids it
                continue
            yield row["name"], value[:40]
            await beside.execute(
                f"DELETE FROM {table} WHERE {owner} NOT LIKE '{GOOD}%';"
                f"INSERT INTO {table} OVERRIDING SYSTEM VALUE SELECT * FROM kept"
            )
    await beside.execute("DROP TABLE kept")


@pytest.mark.parametrize("table", TABLES)
async def test_damaged_row_harms_no_other_session(
    table: str, postgres_url: str, beside: Connection
) -> None:
    async with open_store(StoreUrl.parse(postgres_url)) as store:
        await play(store, GOOD)
        await play(store, BAD)
        good, bad, shared = await view(store, GOOD), await view(store, BAD), await lists(store)
        tried = 0
        async for damage in damages(beside, table):
            tried += 1
            assert await view(store, GOOD) == good, damage
            found = await lists(store)
            for name, items in shared.items():
                mine = [it for it in items if GOOD in str(it)]
                assert [it for it in found[name] if GOOD in str(it)] == mine, (damage, name)
            await view(store, BAD)
        assert await view(store, BAD) == bad
        assert await lists(store) == shared
        assert tried > 10
