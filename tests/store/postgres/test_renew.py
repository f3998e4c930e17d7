"""A database that is not what it was: nodes that work over it notice, and it gets a new id."""

from __future__ import annotations

import asyncio

import pytest

from runlane_server.access.caller import AuthenticationFailed
from runlane_server.access.control import AccessControl
from runlane_server.access.node_keys import NodeKeys
from runlane_server.cli import maintenance
from runlane_server.cluster.key_refresh import refresh
from runlane_server.core.errors import StartError
from runlane_server.store.base import StoreError
from runlane_server.store.open import StoreUrl
from runlane_server.store.postgres import log as postgres_log
from runlane_server.store.postgres.database import Database
from runlane_server.store.postgres.renew import renew, rotate_node_key
from support.postgres import Connection, listening, postgres_store
from support.story import START, Story

SECONDS = 30.0

LOSE_AN_EVENT = "DELETE FROM events WHERE position = (SELECT max(position) FROM events)"
NEW_ID = "UPDATE store SET store_id = '\\x0102030405060708'"


FOLLOWING = (
    "SELECT pid FROM pg_stat_activity WHERE application_name = 'runlane'"
    " AND query LIKE '%FROM events%' AND datname = current_database()"
)


async def lose_connections(beside: Connection) -> None:
    """As a restart of the database does; returns when they are gone."""
    ended = {row["pid"] for row in await beside.fetch(FOLLOWING)}
    await beside.execute("SELECT pg_terminate_backend(pid) FROM unnest($1::int[]) AS pid", ended)
    async with asyncio.timeout(SECONDS):
        while not ended.isdisjoint({row["pid"] for row in await beside.fetch(FOLLOWING)}):
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("change", [LOSE_AN_EVENT, NEW_ID], ids=["lost an event", "new id"])
async def test_r25_node_stops_if_its_database_lost_events(
    postgres_url: str, beside: Connection, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_log, "POLL_SECONDS", 0.02)
    told: asyncio.Queue[StoreError] = asyncio.Queue()
    store = postgres_store(postgres_url)
    store.on_failure = told.put_nowait
    async with store:
        for run_id in ("a", "b"):
            await Story(store, run_id).play(run_id)
        await beside.execute(change)
        await lose_connections(beside)
        async with asyncio.timeout(SECONDS):
            error = await told.get()
        assert "runlane-server renew" in error.message
        assert store.failed == error
    assert told.empty()
    async with postgres_store(postgres_url) as again:
        assert again.failed is None


async def test_node_whose_log_was_compacted_goes_on(
    postgres_url: str, beside: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_log, "POLL_SECONDS", 0.02)
    async with postgres_store(postgres_url) as store:
        await Story(store, "a").play("a")
        assert await store.compact(2 * START, 10) == 1
        await lose_connections(beside)
        await listening(postgres_url, 1)
        assert store.failed is None
        assert store.position == store.compacted == 1


async def test_renewed_store_has_a_new_id_and_all_else(postgres_url: str) -> None:
    async with postgres_store(postgres_url) as store:
        await Story(store).play("a")
        old, keys = store.store_id, store.cluster.node_keys
    assert "new id" in await renew(Database.parse(postgres_url))
    async with postgres_store(postgres_url) as store:
        assert len(store.store_id) == 8
        assert store.store_id != old
        (key,) = store.cluster.node_keys
        assert len(key) == 64
        assert [key] != keys
        assert store.position == 1


async def test_store_of_nodes_at_work_is_not_renewed(postgres_url: str, beside: Connection) -> None:
    async with postgres_store(postgres_url) as store:
        old = store.store_id
        await store.cluster.join("node", "10.0.0.1:50051")
        with pytest.raises(StartError, match=r"nodes were running .*10\.0\.0\.1:50051"):
            await renew(Database.parse(postgres_url))
    async with postgres_store(postgres_url) as store:
        assert store.store_id == old
    # Those who were in the backup have long been silent.
    await beside.execute("UPDATE nodes SET heartbeat = heartbeat - interval '31 s'")
    await renew(Database.parse(postgres_url))


async def test_rotation_reaches_running_nodes_and_keeps_one_old_key(postgres_url: str) -> None:
    database = Database.parse(postgres_url)
    async with postgres_store(postgres_url) as store:
        cluster = store.cluster
        (first,) = cluster.node_keys
        access = AccessControl(node_keys=NodeKeys([first]))
        signed = access.node_keys.sign("", "acme", "r")
        assert "a new key" in await rotate_node_key(database)
        await refresh(cluster, access)
        second, kept = cluster.node_keys
        assert (kept, len(second)) == (first, 64)
        assert access.node_keys.verify(signed) == ("acme", "r")
        await rotate_node_key(database)
        await refresh(cluster, access)
        assert tuple(cluster.node_keys) == (cluster.node_keys[0], second)
        with pytest.raises(AuthenticationFailed, match="wrong node signature"):
            access.node_keys.verify(signed)
        # A node that starts now has the same two keys.
        async with postgres_store(postgres_url) as other:
            assert tuple(other.cluster.node_keys) == tuple(cluster.node_keys)


async def test_renew_refuses_a_schema_without_a_store(postgres_url: str) -> None:
    with pytest.raises(StartError, match="the schema has no store"):
        await renew(Database.parse(postgres_url))
    with pytest.raises(StartError, match=r"127\.0\.0\.1:1"):
        await renew(Database.parse("postgresql://postgres@127.0.0.1:1/none"))
    with pytest.raises(StartError, match=r"rotate-node-key .*the schema has no store"):
        await rotate_node_key(Database.parse(postgres_url))
    for other in ("sqlite:///runlane.db", "memory:"):
        with pytest.raises(StartError, match="rotate-node-key: "):
            maintenance.rotate_node_key(StoreUrl.parse(other))
        with pytest.raises(StartError, match="renew: "):
            maintenance.renew(StoreUrl.parse(other))
