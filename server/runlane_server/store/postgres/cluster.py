"""The nodes that share a database: which are alive, lost runs, and lanes to claim.

Each method is one round trip, and all times are the database's. Nothing here decides anything: the
caller commits to a lane, and the lane's version decides.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import structlog

from runlane_server.core.model import RunKey, SessionKey
from runlane_server.store.base import AnsweredRun, ClaimOrder, HostedRun
from runlane_server.store.postgres.connection import Connector
from runlane_server.store.postgres.notifier import Notifier
from runlane_server.store.postgres.pool import Pool
from runlane_server.store.postgres.queries import key_of
from runlane_server.store.postgres.schema import SQL
from runlane_server.store.postgres.text import escape, unescape

log = structlog.get_logger()

FORGOTTEN_AFTER = timedelta(days=1)
"""The time after which the row of a dead or silent node is deleted."""

MOST_CONNECTIONS = 3
"""Connections of their own, so that a heartbeat waits neither for a read nor for a wake-up."""

TIMEOUT = 5.0
"""Timeout of a call in seconds: a node must notice soon that it cannot renew its lease."""


async def open_cluster_pool(connector: Connector) -> Pool:
    """The connections for heartbeats, claims and wake-ups.

    They need not wait for the disk: a write that a crash of the database loses is repeated.
    A commit that depends on such a write comes later in the database's write-ahead log, so it never
    survives a crash that its cause did not.
    """
    relaxed = replace(connector, durability="off")
    return await Pool.open(relaxed, most=MOST_CONNECTIONS, timeout=TIMEOUT)


class PostgresCluster:
    """See `base.Cluster`."""

    def __init__(self, pool: Pool, notifier: Notifier, node_keys: Sequence[str]) -> None:
        self.node_keys = node_keys
        self.on_wake: Callable[[], None] | None = None
        self._pool = pool
        self._notifier = notifier

    async def refresh_node_keys(self) -> None:
        """Reads `node_keys` again."""
        rows = await self._rows("node_keys")
        self.node_keys = rows[0]["peer_key"].split()

    # Which nodes are alive

    async def join(self, node_id: str, address: str) -> None:
        """Registers a node. A dead node stays dead; it must join under another id."""
        await self._rows("join", escape(node_id), escape(address))

    async def heartbeat(self, node_id: str, lease: float) -> bool:
        """Renews the lease of a node. Returns False if it was declared dead, or has left.

        Declares dead the nodes that were silent for `lease` seconds, unless this node was itself
        silent for that long within the last `lease` seconds, or the database was started within
        them: after an outage of the database, the first node to return must not declare the others
        dead. Deletes nodes that died long ago.
        """
        rows = await self._rows("beat", escape(node_id), timedelta(seconds=lease), FORGOTTEN_AFTER)
        alive: bool = rows[0]["alive"]
        return alive

    async def leave(self, node_id: str) -> None:
        await self._rows("leave", escape(node_id))

    async def hosts(self, keys: Collection[RunKey]) -> Mapping[RunKey, str]:
        """The addresses of the nodes on which these runs are active. Runs that are not active, or
        whose node is dead, are left out."""
        tenants = [escape(key.tenant) for key in keys]
        run_ids = [escape(key.run_id) for key in keys]
        rows = await self._rows("hosts", tenants, run_ids)
        return {
            RunKey(unescape(row["tenant"]), unescape(row["run_id"])): unescape(row["address"])
            for row in rows
        }

    async def lane_versions(self, keys: Collection[SessionKey]) -> Mapping[SessionKey, int]:
        tenants = [escape(key.tenant) for key in keys]
        session_ids = [escape(key.session_id) for key in keys]
        rows = await self._rows("lane_versions", tenants, session_ids)
        return {key_of(row): row["version"] for row in rows}

    # Work

    async def lost_runs(self, limit: int, node_id: str = "") -> Sequence[HostedRun]:
        rows = await self._rows("lost_runs", limit, escape(node_id))
        return [replace(_hosted(row), host=unescape(row["host"])) for row in rows]

    async def cancelled_runs(self, node_id: str) -> Sequence[HostedRun]:
        return [_hosted(row) for row in await self._rows("cancelled_runs", escape(node_id))]

    async def answered_runs(self, node_id: str, after: int, limit: int) -> Sequence[AnsweredRun]:
        rows = await self._rows("answered_runs", escape(node_id), after, limit)
        return [AnsweredRun(key_of(row), row["run_no"]) for row in rows]

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
        agents = [share.agent for share in order.agents]
        agent_rooms = [share.room for share in order.agents]
        rows = await self._rows(
            "claim",
            escape(node_id),
            limit,
            held,
            tenants,
            rooms,
            order.others,
            agents,
            agent_rooms,
        )
        return [key_of(row) for row in rows]

    async def waiting_runs(self) -> Mapping[str, int]:
        rows = await self._rows("waiting_runs")
        return {unescape(row["tenant"]): row["runs"] for row in rows}

    # Wake-ups

    def wake(self) -> None:
        self._notifier.announce_work()

    def on_wake_up(self) -> None:
        """Reports that another node has, or may have, announced work."""
        if self.on_wake is None:
            return
        try:
            self.on_wake()
        except Exception:
            log.exception("wake-up callback failed")

    async def _rows(self, name: str, *args: object) -> Sequence[Any]:
        return await self._pool.fetch(SQL[name], *args)


def _hosted(row: Any) -> HostedRun:
    return HostedRun(key_of(row), unescape(row["run_id"]), row["attempt"])
