"""The nodes that share a database: who is alive, what the others left behind, and what waits.

Each method is one round trip, and all times are the database's. Nothing here decides anything: who
acts on what it is told commits to a lane, and the version of the lane decides.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import structlog

from runlane_server.core.model import RunKey, SessionKey
from runlane_server.store.base import ClaimOrder, HostedRun
from runlane_server.store.postgres.connection import Connector
from runlane_server.store.postgres.notifier import Notifier
from runlane_server.store.postgres.pool import Pool
from runlane_server.store.postgres.queries import key_of
from runlane_server.store.postgres.schema import SQL
from runlane_server.store.postgres.text import escape, unescape

log = structlog.get_logger()

FORGOTTEN_AFTER = timedelta(days=1)
"""How long a node stays known that was lost, or says nothing."""

MOST_CONNECTIONS = 3
"""A sign of life waits for no page that somebody reads, nor for a wake-up."""

TIMEOUT = 5.0
"""Seconds after which an answer is given up: whoever lives by a lease has to know soon."""


async def open_talk(connector: Connector) -> Pool:
    """The connections for what nodes tell each other.

    It need not reach the disk at once: what a crash of the database takes back is said again. And
    what a node commits because of it comes later in the log of the database, so it does not outlive
    its reason.
    """
    relaxed = replace(connector, durability="off")
    return await Pool.open(relaxed, most=MOST_CONNECTIONS, timeout=TIMEOUT)


class PostgresCluster:
    """See `base.Cluster`."""

    def __init__(self, pool: Pool, notifier: Notifier, peer_key: str) -> None:
        self.peer_key = peer_key
        self.on_wake: Callable[[], None] | None = None
        self._pool = pool
        self._notifier = notifier

    # Who is alive

    async def join(self, node_id: str, address: str) -> None:
        """Makes a node known. One that was lost stays so; it has to join under another id."""
        await self._rows("join", escape(node_id), escape(address))

    async def beat(self, node_id: str, lease: float) -> bool:
        """Says that a node is alive; False if it is taken for lost, or has left.

        Takes others for lost who have been silent for `lease` seconds; unless this one had been so
        itself, within the last `lease` seconds: after a time without the database the first one to
        come back must not take the others for lost. Forgets who was lost long ago.
        """
        rows = await self._rows("beat", escape(node_id), timedelta(seconds=lease), FORGOTTEN_AFTER)
        alive: bool = rows[0]["alive"]
        return alive

    async def leave(self, node_id: str) -> None:
        """Forgets a node. What it still hosts is lost."""
        await self._rows("leave", escape(node_id))

    async def hosts(self, keys: Collection[RunKey]) -> Mapping[RunKey, str]:
        """The addresses of the nodes where those runs are active; without those that are not, and
        those whose node is lost."""
        tenants = [escape(key.tenant) for key in keys]
        run_ids = [escape(key.run_id) for key in keys]
        rows = await self._rows("hosts", tenants, run_ids)
        return {
            RunKey(unescape(row["tenant"]), unescape(row["run_id"])): unescape(row["address"])
            for row in rows
        }

    # What there is to do

    async def lost_runs(self, limit: int) -> Sequence[HostedRun]:
        """Active runs whose node is lost or gone, the longest active first."""
        return [_hosted(row) for row in await self._rows("lost_runs", limit)]

    async def cancelled_runs(self, node_id: str) -> Sequence[HostedRun]:
        """Active runs of a node that a cancel has covered."""
        return [_hosted(row) for row in await self._rows("cancelled_runs", escape(node_id))]

    async def claim(
        self, node_id: str, limit: int, hold: float, order: ClaimOrder | None = None
    ) -> Sequence[SessionKey]:
        """Lanes with runs that wait and none that is active, in equal shares for the tenants whose
        turn it is; of each the longest waiting.

        No other node gets them for `hold` seconds; this one may get them again.
        """
        order = order or ClaimOrder()
        tenants = [escape(share.tenant) for share in order.shares]
        rooms = [share.room for share in order.shares]
        held = timedelta(seconds=hold)
        rows = await self._rows("claim", escape(node_id), limit, held, tenants, rooms, order.others)
        return [key_of(row) for row in rows]

    async def waiting_runs(self) -> Mapping[str, int]:
        """How many runs of each tenant wait; without those that have none."""
        rows = await self._rows("waiting_runs")
        return {unescape(row["tenant"]): row["runs"] for row in rows}

    # Wake-ups

    def wake(self) -> None:
        """Wakes the other nodes, soon."""
        self._notifier.work()

    def woken(self) -> None:
        """Another node said that there is something to do, or may have."""
        if self.on_wake is None:
            return
        try:
            self.on_wake()
        except Exception:
            log.exception("who is woken by other nodes failed")

    async def _rows(self, name: str, *args: object) -> Sequence[Any]:
        return await self._pool.fetch(SQL[name], *args)


def _hosted(row: Any) -> HostedRun:
    return HostedRun(key_of(row), unescape(row["run_id"]), row["attempt"])
