"""Recovers the runs of dead nodes: each node its share, and what the others leave."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TypeAlias

import structlog

from runlane_server.store.base import Cluster, HostedRun

log = structlog.get_logger()

LOST_RUNS = 500
"""Maximum number of lost runs read at a time."""

Recover: TypeAlias = Callable[[Sequence[HostedRun]], Awaitable[None]]


class Failover:
    """Finds lost runs and has them recovered, until none is left that may be.

    Two nodes may recover the same run: the version of its lane lets one of them win.
    """

    def __init__(self, cluster: Cluster, recover: Recover) -> None:
        """`recover` gets runs whose node is dead. A run that it leaves lost is tried again in the
        next round, and keeps no other waiting."""
        self._cluster = cluster
        self._recover = recover
        self._seen: Collection[HostedRun] = frozenset()

    async def recover_all(self, node_id: str) -> None:
        """One round: the share of this node, then runs that other nodes have left since the round
        before. Raises StoreUnavailable."""
        tried: set[HostedRun] = set()
        while due := await self._find(node_id, tried):
            await self._recover_now(due, tried)
        while due := [run for run in await self._find("", tried) if run in self._seen]:
            await self._recover_now(due, tried)
        self._seen = frozenset(await self._cluster.lost_runs(LOST_RUNS + len(tried)))

    async def _find(self, share: str, tried: set[HostedRun]) -> list[HostedRun]:
        """Lost runs that were not tried yet."""
        # What cannot be recovered stays first, so that more must be read behind it.
        lost = await self._cluster.lost_runs(LOST_RUNS + len(tried), share)
        return [run for run in lost if run not in tried]

    async def _recover_now(self, due: Sequence[HostedRun], tried: set[HostedRun]) -> None:
        for run in due:
            log.warning("recovering run of dead node", run_id=run.run_id, attempt=run.attempt)
        await self._recover(due)
        tried.update(due)
