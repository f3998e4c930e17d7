"""How the database is connected to: what is said at first, what is set, and how often."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from runlane_server.store.postgres import cluster as postgres_cluster
from runlane_server.store.postgres import pool as postgres_pool
from runlane_server.store.postgres import writer as postgres_writer
from runlane_server.store.postgres.connection import Connector
from runlane_server.store.postgres.database import Database
from support.postgres import OwnPostgres, fresh_database, postgres_store
from support.story import MANY, TENANT, Story

SCALING = Path(__file__).parents[3] / "docs" / "scaling.md"

LET_THROUGH = {"user", "database", "client_encoding", "application_name"}
"""The startup parameters that PgBouncer accepts; it refuses any other."""


async def test_nothing_is_said_at_first_that_a_pgbouncer_refuses(tmp_path: Path) -> None:
    said: asyncio.Queue[bytes] = asyncio.Queue()

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        length = int.from_bytes(await reader.readexactly(4), "big")
        said.put_nowait(await reader.readexactly(length - 4))
        writer.close()

    async with await asyncio.start_unix_server(hear, tmp_path / ".s.PGSQL.5432"):
        database = Database.parse(f"postgresql://postgres@/postgres?host={tmp_path}&schema=other")
        with pytest.raises((asyncpg.PostgresError, OSError)):
            await Connector(database, "on").connect()
    version, fields = (first := said.get_nowait())[:4], first[4:].split(b"\0")
    assert int.from_bytes(version, "big") == 3 << 16
    assert {name.decode() for name in fields[::2] if name} <= LET_THROUGH


async def test_settings_hold_on_every_connection(postgres_url: str) -> None:
    database = Database.parse(postgres_url)
    connection = await Connector(database, "off").connect()
    for name, value in {
        "application_name": "runlane",
        "search_path": f'"{database.schema}"',
        "synchronous_commit": "off",
        "statement_timeout": "12s",
        "enable_seqscan": "off",
    }.items():
        assert await connection.fetchval("SELECT current_setting($1)", name) == value
    await connection.close()


async def test_a_node_has_no_more_connections_than_is_said(own_server: OwnPostgres) -> None:
    writers = postgres_writer.OTHERS + 1
    most = 1 + writers + postgres_pool.MOST_CONNECTIONS + postgres_cluster.MOST_CONNECTIONS
    assert f"{most} connections" in SCALING.read_text()
    beside = await asyncpg.connect(own_server.url)
    query = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE application_name = 'runlane' AND backend_type = 'client backend'"
    )
    before = await beside.fetchval(query)
    async with fresh_database(own_server.url) as url, postgres_store(url) as store:
        stories = [Story(store, f"s{n}") for n in range(100)]
        await asyncio.gather(*(story.accept(story.session_id) for story in stories))
        ended = stories[0]
        await ended.start()
        await asyncio.gather(
            *(story.start() for story in stories[1:]),
            ended.finish(),
            *(store.list_runs(TENANT, limit=MANY) for _ in range(100)),
            *(store.cluster.waiting_runs() for _ in range(100)),
        )
        assert await beside.fetchval(query) - before == most
    await beside.close()
