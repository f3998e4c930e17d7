"""The connections that read, and what becomes of those that are lost."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from runlane_server.store.fair_queue import FairSlots
from runlane_server.store.postgres.connection import Connector
from runlane_server.store.postgres.database import Database
from runlane_server.store.postgres.pool import Pool
from support.postgres import Connection, OwnPostgres, until_blocked


@dataclass(frozen=True)
class Remembering(Connector):
    """Has all connections that it made."""

    made: list[Connection] = field(default_factory=list)

    async def connect(self) -> Connection:
        self.made.append(await super().connect())
        return self.made[-1]


async def test_unnoticed_loss_of_a_connection_logs_nothing(
    own_server: OwnPostgres,
) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: complaints.append(told))
    connector = Remembering(Database.parse(own_server.url))
    pool = await Pool.open(connector)
    await asyncio.gather(*(pool.fetch("SELECT pg_sleep(0.1)") for _ in range(2)))
    lost = [*connector.made]
    assert len(lost) == 2
    for connection in lost:
        connection._transport.pause_reading()  # type: ignore[attr-defined]
    await own_server.restart()
    # One of them is found dead, so the other one is given up before it is used.
    await pool.fetch("SELECT 1")
    await asyncio.gather(*(pool.fetch("SELECT pg_sleep(0.1)") for _ in range(2)))
    assert all(connection.is_closed() for connection in lost)
    await pool.close()
    assert complaints == []


async def test_tenant_with_many_statements_delays_others_by_one(own_server: OwnPostgres) -> None:
    connector = Connector(Database.parse(own_server.url))
    holder = await connector.connect()
    await holder.execute("SELECT pg_advisory_lock(7)")
    pool = await Pool.open(connector, most=1)
    ended: list[str] = []

    async def read(tenant: str, query: str = "SELECT 1") -> None:
        await pool.fetch(query, tenant=tenant)
        ended.append(tenant)

    reads = [asyncio.create_task(read("busy", "SELECT pg_advisory_xact_lock(7)"))]
    await until_blocked(holder)
    reads += [asyncio.create_task(read(tenant)) for tenant in ["busy"] * 20 + ["quiet"] * 2]
    await asyncio.sleep(0)
    reads[5].cancel()
    await holder.execute("SELECT pg_advisory_unlock(7)")
    await asyncio.gather(*reads, return_exceptions=True)
    assert ended[:5] == ["busy", "busy", "quiet", "busy", "quiet"]
    assert len(ended) == 22
    holder.terminate()
    await pool.close()


async def test_cancelled_statements_keep_no_slot() -> None:
    slots = FairSlots(1)
    await slots.acquire("a")
    waiting = [asyncio.create_task(slots.acquire(tenant)) for tenant in "abc"]
    await asyncio.sleep(0)
    waiting[0].cancel()  # while it waits
    slots.release()
    waiting[1].cancel()  # when it was just given the slot
    await asyncio.gather(*waiting[:2], return_exceptions=True)
    await waiting[2]
    slots.release()
    await slots.acquire("d")
