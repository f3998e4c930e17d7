"""The connections that read, and what becomes of those that are lost."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from runlane_server.store.postgres.connection import Connector
from runlane_server.store.postgres.database import Database
from runlane_server.store.postgres.pool import Pool
from support.postgres import Connection, OwnPostgres


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
