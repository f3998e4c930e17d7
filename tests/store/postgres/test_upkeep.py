"""The upkeep of the log costs the same while the database keeps old rows for others."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from support.postgres import Connection, plain, postgres_store

EVENTS = 10_000
STEP = 10

_FILL = """
INSERT INTO events (position, ended_at, log_bytes, tenant, session_id, run_id, body)
SELECT n, n, 100 * n, 't', 's', 'r' || n, repeat('x', 200) FROM generate_series(1, $1::bigint) AS n
"""


@asynccontextmanager
async def watched(url: str) -> AsyncIterator[None]:
    """A transaction that may still look at everything that is removed meanwhile."""
    old = await plain(url)
    try:
        async with old.transaction(isolation="repeatable_read"):
            assert await old.fetchval("SELECT count(*) FROM events") == EVENTS
            yield
    finally:
        await old.close()


async def blocks(connection: Connection, statement: str) -> int:
    """The number of pages that a statement looks at. It is executed."""
    plan = json.loads(
        await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}")
    )[0]["Plan"]
    return int(plan["Shared Hit Blocks"]) + int(plan["Shared Read Blocks"])


@pytest.mark.parametrize("largest", ["NULL", "0"])
async def test_compaction_never_walks_what_it_has_removed(
    postgres_url: str, beside: Connection, largest: str
) -> None:
    """A transaction that is open keeps the removed rows from being vacuumed."""
    async with postgres_store(postgres_url):
        pass
    await beside.execute(_FILL.replace("$1::bigint", str(EVENTS)))
    await beside.execute("ANALYZE events")
    async with watched(postgres_url):
        step = f"SELECT compact(9999999, {STEP}, {largest}, 100000, 100000000)"
        await blocks(beside, step)  # makes the plans
        first = await blocks(beside, step)
        await beside.execute(step.replace(f" {STEP},", f" {EVENTS - 100},"))
        later = await blocks(beside, step)
        assert later < first + 50
        assert await beside.fetchval("SELECT emptied FROM store") == EVENTS - 100 + 3 * STEP
        assert await beside.fetchval("SELECT count(*) FROM events") == 100 - 3 * STEP


async def test_append_to_an_emptied_log_never_walks_what_was_removed(
    postgres_url: str, beside: Connection
) -> None:
    async with postgres_store(postgres_url):
        pass
    append = "SELECT append_to_log(ARRAY[ROW(1, 1, 'u', 's', 'r', 'x')::new_event])"
    await blocks(beside, append)  # makes the plans
    await beside.execute("DELETE FROM events")
    await beside.execute(_FILL.replace("$1::bigint", str(EVENTS)))
    async with watched(postgres_url):
        few = await blocks(beside, append)
        await beside.execute("SELECT compact(9999999, 99999, NULL, 100000, 100000000)")
        assert await beside.fetchval("SELECT count(*) FROM events") == 0
        assert await blocks(beside, append) < 2 * few + 20
        row = await beside.fetchrow("SELECT min(position), max(position) FROM events")
        assert tuple(row or ()) == (EVENTS + 2, EVENTS + 2)


async def test_what_is_claimed_and_updated_stays_on_its_page(
    postgres_url: str, beside: Connection
) -> None:
    async with postgres_store(postgres_url):
        pass
    rows = await beside.fetch(
        "SELECT relname, array_to_string(reloptions, ' ') AS options FROM pg_class"
        " WHERE relnamespace = current_schema()::regnamespace AND reloptions IS NOT NULL"
    )
    options = {row["relname"]: row["options"] for row in rows}
    assert {"events", "nodes", "run_events", "runs", "sessions", "store"} <= {*options}
    await beside.execute(
        "INSERT INTO nodes (node_id, address) SELECT 'n' || n, '' FROM generate_series(1, 9) AS n"
    )
    for _ in range(9):
        await beside.execute("UPDATE nodes SET heartbeat = clock_timestamp()")
    pages = await beside.fetchval("SELECT pg_relation_size('nodes') / 8192")
    assert pages == 1
