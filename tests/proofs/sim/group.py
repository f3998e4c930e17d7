"""The nodes of a simulated world that share one disk: what the store of a cluster keeps of them.

It decides as `store/postgres` does, by the clock of the store, which is not that of the nodes.
Announcements among the nodes are late, and some are lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol, TypeVar
from zlib import crc32

from proofs.sim.history import History
from runlane_server.core.agents import DEFAULT_AGENT
from runlane_server.core.model import RunKey, RunState, SessionKey
from runlane_server.core.transition import Lane, LaneRun
from runlane_server.store.base import AnsweredRun, ClaimOrder, HostedRun, Position

T = TypeVar("T")

NODE_LEASE = 6.0
"""Seconds without a heartbeat after which the others declare a node dead."""

DRIFT = 0.01
"""How much faster or slower the clock of the store runs than that of the nodes."""

LOST = 0.25
"""Fraction of the announcements that do not arrive."""

POLL_SECONDS = 1.0


@dataclass(slots=True)
class _Member:
    """A node. It declares no other dead while it has not been `steady_since` a lease."""

    heartbeat: float
    steady_since: float = float("-inf")
    is_lost: bool = False


class Lanes(Protocol):
    """The committed lanes."""

    def lanes(self) -> list[Lane]:
        """All lanes."""


class Group:
    """The rows of the nodes and of their claims."""

    def __init__(self, disk: Lanes, rng: Random, history: History) -> None:
        self._disk = disk
        self._rng = rng
        self._history = history
        self._rate = 1 + DRIFT * rng.uniform(-1, 1)
        self._members: dict[str, _Member] = {}
        self._claims: dict[SessionKey, tuple[str, float]] = {}
        self._listening: list[SimCluster] = []

    def now(self) -> float:
        """The clock of the store, in seconds."""
        return self._history.now * self._rate

    # Announcements

    def listen(self, cluster: SimCluster) -> None:
        """Passes announcements of the others to a node."""
        self._listening.append(cluster)

    def leave(self, cluster: SimCluster) -> None:
        """Passes no more of them to it."""
        if cluster in self._listening:
            self._listening.remove(cluster)

    def announce(self, sender: SimCluster, position: Position, *, work: bool) -> None:
        """Announces events of the log, or work, to the other nodes."""
        for other in self._listening:
            if other is not sender and self._rng.random() >= LOST:
                delay = self._rng.choice([0, 0.001, 0.01, 0.2])
                asyncio.get_running_loop().call_later(
                    delay, other.on_announced, position, work, context=other.context
                )

    # Nodes

    def join(self, node_id: str) -> None:
        """Registers a node."""
        self._members[node_id] = _Member(self.now())

    def beat(self, node_id: str, lease: float) -> bool:
        """Renews a lease, and ends those of silent nodes. See `PostgresCluster.heartbeat`."""
        own, now = self._members.get(node_id), self.now()
        if own is None or own.is_lost:
            return False
        if own.heartbeat < now - lease:
            own.steady_since = now
        own.heartbeat = now
        if own.steady_since <= now - lease:
            for other_id, other in self._members.items():
                if other.heartbeat < now - lease and not other.is_lost:
                    other.is_lost = True
                    self._declare_lost(other_id)
        return True

    def remove(self, node_id: str) -> None:
        """A node leaves."""
        if (left := self._members.pop(node_id, None)) is not None and not left.is_lost:
            self._declare_lost(node_id)

    def _declare_lost(self, node_id: str) -> None:
        self._history.note("group", f"{node_id} is lost")
        self._history.lost_hosts.add(node_id)

    @property
    def _alive(self) -> list[str]:
        return sorted(node_id for node_id, it in self._members.items() if not it.is_lost)

    # Work

    def lost_runs(self, limit: int, node_id: str) -> Sequence[HostedRun]:
        """Active runs without a node, or the share of a node among them."""
        alive = self._alive
        place = sum(it < node_id for it in alive)
        lost = [
            HostedRun(lane.key, run.run_id, run.attempt, run.host)
            for lane, run in self._active()
            if run.host not in alive
            and (run.host or run.state is not RunState.INPUT_REQUIRED)
            and (not node_id or crc32(run.run_id.encode()) % max(len(alive), 1) == place)
        ]
        return lost[:limit]

    def cancelled_runs(self, node_id: str) -> Sequence[HostedRun]:
        """Active runs of a node that are to stop."""
        return [
            HostedRun(lane.key, run.run_id, run.attempt)
            for lane, run in self._active()
            if run.host == node_id and run.state is RunState.CANCELLING
        ]

    def claim(
        self, node_id: str, limit: int, hold: float, order: ClaimOrder
    ) -> Sequence[SessionKey]:
        """Lanes that wait for a node, the longest waiting first. There is one tenant."""
        rooms = {share.agent: share.room for share in order.agents}
        claimed: list[SessionKey] = []
        waiting = [lane for lane in self._disk.lanes() if lane.can_start]
        for lane in sorted(waiting, key=lambda it: it.waiting[0].accepted_at):
            agent = lane.waiting[0].agent or DEFAULT_AGENT
            by, until = self._claims.get(lane.key, ("", float("-inf")))
            is_free = until <= self.now() or by == node_id
            if is_free and rooms.get(agent, 0) > 0 and len(claimed) < limit:
                rooms[agent] -= 1
                self._claims[lane.key] = (node_id, self.now() + hold)
                claimed.append(lane.key)
        return claimed

    def on_committed(self, lane: Lane) -> None:
        """A commit ends the claim of a lane; nobody gets it while its run waits for an attempt."""
        self._claims.pop(lane.key, None)
        head = lane.backing_off
        if head is not None and head.retry is not None:
            pause = head.retry.pause(head.failures) / 1e6
            self._claims[lane.key] = ("", self.now() + pause)

    def versions(self) -> Mapping[SessionKey, int]:
        """The versions of all lanes."""
        return {lane.key: lane.version for lane in self._disk.lanes()}

    def hosts(self) -> Mapping[str, str]:
        """The nodes of all active runs."""
        alive = self._alive
        return {run.run_id: run.host for _, run in self._active() if run.host in alive}

    def waiting_runs(self) -> Mapping[str, int]:
        """The waiting runs by tenant."""
        runs: dict[str, int] = {}
        for lane in self._disk.lanes():
            if lane.waiting:
                runs[lane.key.tenant] = runs.get(lane.key.tenant, 0) + len(lane.waiting)
        return runs

    def _active(self) -> list[tuple[Lane, LaneRun]]:
        return [(lane, lane.active) for lane in self._disk.lanes() if lane.active is not None]


class SimCluster:
    """The other nodes, as one node sees them. See `base.Cluster`.

    `call` asks the store of the node; `on_log` is called when the log may have new events.
    """

    def __init__(
        self,
        group: Group,
        call: Callable[[Callable[[], Any]], Coroutine[Any, Any, Any]],
        on_log: Callable[[Position], None],
    ) -> None:
        self.on_wake: Callable[[], None] | None = None
        self.node_keys: Sequence[str] = ()
        self.context: Context = copy_context()
        self._group = group
        self._call = call
        self._on_log = on_log

    def open(self) -> None:
        """Listens to the other nodes, in the context of the own one."""
        self.context = copy_context()
        self._group.listen(self)

    def close(self) -> None:
        """Listens no more."""
        self._group.leave(self)

    def on_announced(self, position: Position, work: bool) -> None:
        """Another node announces events or work."""
        if position:
            self._on_log(position)
        if work and self.on_wake is not None:
            self.on_wake()

    def announce_log(self, position: Position) -> None:
        """Announces events up to a position."""
        self._group.announce(self, position, work=False)

    def wake(self) -> None:
        """Announces work."""
        self._group.announce(self, 0, work=True)

    async def refresh_node_keys(self) -> None:
        """Does nothing: no node calls another one."""

    async def join(self, node_id: str, address: str) -> None:
        """Registers a node."""
        await self._call(lambda: self._group.join(node_id))

    async def heartbeat(self, node_id: str, lease: float) -> bool:
        """Renews the lease of a node."""
        return bool(await self._call(lambda: self._group.beat(node_id, lease)))

    async def leave(self, node_id: str) -> None:
        """Removes a node."""
        await self._call(lambda: self._group.remove(node_id))

    async def lost_runs(self, limit: int, node_id: str = "") -> Sequence[HostedRun]:
        """Active runs whose node is gone."""
        lost: Sequence[HostedRun]
        lost = await self._call(lambda: self._group.lost_runs(limit, node_id))
        return lost

    async def cancelled_runs(self, node_id: str) -> Sequence[HostedRun]:
        """Active runs of a node that a cancel covers."""
        runs: Sequence[HostedRun] = await self._call(lambda: self._group.cancelled_runs(node_id))
        return runs

    async def answered_runs(self, node_id: str, after: int, limit: int) -> Sequence[AnsweredRun]:
        """None: the agents of a simulation ask nobody."""
        return ()

    async def claim(
        self, node_id: str, limit: int, hold: float, order: ClaimOrder | None = None
    ) -> Sequence[SessionKey]:
        """Claims lanes that wait for a node."""
        wanted = order or ClaimOrder()
        keys: Sequence[SessionKey]
        keys = await self._call(lambda: self._group.claim(node_id, limit, hold, wanted))
        return keys

    async def waiting_runs(self) -> Mapping[str, int]:
        """The number of waiting runs by tenant."""
        runs: Mapping[str, int] = await self._call(self._group.waiting_runs)
        return runs

    async def hosts(self, keys: Collection[RunKey]) -> Mapping[RunKey, str]:
        """The nodes of active runs."""
        hosts: Mapping[str, str] = await self._call(self._group.hosts)
        return {key: hosts[key.run_id] for key in keys if key.run_id in hosts}

    async def lane_versions(self, keys: Collection[SessionKey]) -> Mapping[SessionKey, int]:
        """The versions of lanes."""
        versions: Mapping[SessionKey, int] = await self._call(self._group.versions)
        return {key: versions[key] for key in keys if key in versions}
