"""Writes cost the same, however large tables become whose rows nobody has counted yet."""

from __future__ import annotations

import asyncio

from runlane_server.core.model import CancelScope, TextDelta, WhenBusy
from runlane_server.store.base import NewSession
from runlane_server.store.postgres.store import PostgresStore
from support.postgres import Connection, postgres_store
from support.story import START, Story, request

ROWS = 2_000
PLAYED = 3
"""The times that each kind of write is done: as many connections do it."""

SECONDS = 60.0

_FILL = """
INSERT INTO {table} OVERRIDING SYSTEM VALUE
SELECT (jsonb_populate_record(NULL::{table}, to_jsonb(one) || {changes})).*
FROM (SELECT * FROM {table} LIMIT 1) AS one CROSS JOIN generate_series(1, {rows}) AS n
"""

_COPIES = {
    "sessions": "jsonb_build_object('created_no', 1000 + n, 'session_id', 'copy-' || n)",
    "runs": "jsonb_build_object("
    "'run_no', 1000 + n, 'session_id', 'copy-' || n, 'run_id', 'copy-' || n)",
    "run_events": "jsonb_build_object('run_id', 'copy-' || n)",
    "deleted_runs": "jsonb_build_object('run_id', 'old-copy-' || n)",
    "removed_sessions": "jsonb_build_object('session_id', 'old-copy-' || n)",
    "messages": "jsonb_build_object('session_id', 'copy-' || n)",
    "lane_events": "jsonb_build_object('session_id', 'copy-' || n)",
}

_READ = """
SELECT relname AS name, seq_tup_read AS read FROM pg_stat_user_tables
WHERE schemaname = current_schema()
UNION ALL
SELECT indexrelname, idx_tup_read FROM pg_stat_user_indexes WHERE schemaname = current_schema()
"""

_CONNECTED = """
SELECT count(*) FROM pg_stat_activity
WHERE application_name = 'runlane' AND datname = current_database()
"""


async def played(store: PostgresStore, name: str) -> None:
    story = Story(store, name)
    await story.accept(name, request(f"{name}-2", when_busy=WhenBusy.FOLD))
    await story.start("node")
    await story.append(TextDelta("word "))
    await story.fold()
    await story.finish()


async def cancelled(store: PostgresStore, name: str) -> None:
    story = Story(store, name)
    await story.accept(name, f"{name}-2")
    await story.start("node")
    await story.cancel(CancelScope.WAITING)
    await story.cancel()
    await story.finish()


async def lost(store: PostgresStore, name: str) -> None:
    story = Story(store, name)
    await story.accept(name)
    await story.start("node")
    await story.lose_node()


async def created(store: PostgresStore, name: str) -> None:
    await store.create_session(NewSession(Story(store, name).key, START))


async def removed(store: PostgresStore, name: str) -> None:
    story = Story(store, name)
    await story.play(name)
    await story.remove()


KINDS = (played, cancelled, lost, created, removed)


async def test_no_write_walks_a_table(postgres_url: str, beside: Connection) -> None:
    """A walk would read `ROWS` rows or entries of an index."""
    async with postgres_store(postgres_url) as store:
        for table in _COPIES:
            await beside.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
        # The plans are made while the tables are nearly empty.
        await play_all(store, "first")
        for table, changes in _COPIES.items():
            await beside.execute(_FILL.format(table=table, changes=changes, rows=ROWS))
        await play_all(store, "later")
    async with asyncio.timeout(SECONDS):
        # What a connection did is counted when it has ended.
        while await beside.fetchval(_CONNECTED):
            await asyncio.sleep(0.01)
    await beside.execute("SELECT pg_stat_clear_snapshot()")
    read = {row["name"]: int(row["read"]) for row in await beside.fetch(_READ)}
    assert read["runs_key"] > 0
    assert {name: count for name, count in read.items() if count >= ROWS} == {}


async def play_all(store: PostgresStore, name: str) -> None:
    """Each kind of write, on all connections."""
    for kind in KINDS:
        await asyncio.gather(*[kind(store, f"{name}-{kind.__name__}-{n}") for n in range(PLAYED)])
