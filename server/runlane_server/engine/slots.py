"""The slots of a node, shared fairly between tenants, and the count of waiting runs.

The next free slot goes to the tenant that uses the fewest; among those, to the one whose last grant
is the oldest. Within a tenant the lane that waits longest comes first. Runs last milliseconds or
hours: a plain rotation at the start would give all slots to the tenant with the longest runs. A
tenant at its limit is passed over, and so is a lane whose next run is for an agent that is at its
limit or not ready (R32).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import TypeAlias

from runlane_server.core.agents import DEFAULT_AGENT
from runlane_server.core.model import SessionKey
from runlane_server.engine.agent_room import UNLIMITED, AgentRoom
from runlane_server.store.base import AgentShare, TenantShare

MAX_TENANTS = 1_000
"""Number of tenants above which those without slots and without waiting lanes are evicted."""

Agent: TypeAlias = str | None
"""The agent of the next run of a lane; None: not known until the lane is loaded."""


class WaitingRuns:
    """The number of waiting runs, in total and per tenant.

    The store of several nodes provides the numbers at intervals, by `replace`; in between they are
    adjusted by what this node does.
    """

    def __init__(self) -> None:
        self.total = 0
        self._by_tenant: dict[str, int] = {}

    def of(self, tenant: str) -> int:
        """The number of waiting runs of a tenant."""
        return self._by_tenant.get(tenant, 0)

    def add(self, tenant: str, runs: int) -> None:
        """Adds to the waiting runs of a tenant; `runs` may be negative."""
        if not runs:
            return
        self.total += runs
        left = self._by_tenant.get(tenant, 0) + runs
        if left:
            self._by_tenant[tenant] = left
        else:
            del self._by_tenant[tenant]

    def replace(self, counts: Mapping[str, int]) -> None:
        """Replaces all counts."""
        self._by_tenant = dict(counts)
        self.total = sum(counts.values())


@dataclass(slots=True)
class _Tenant:
    """The slots of a tenant, in use or granted; the number of its last grant, 0 for none; and its
    lanes that wait for a slot, by agent, each with its place in the order of arrival."""

    slots: int = 0
    last_grant: int = 0
    queues: dict[Agent, dict[SessionKey, int]] = field(default_factory=dict)


def _no_limit(tenant: str) -> int | None:
    return None


class Slots:
    """The slots of a node. It starts closed: every lane waits until `open` is called.

    Each free slot is granted to a waiting lane by calling `on_grant`. The lane then uses it with
    `take`, or gives it back with `settle`. `limit_of` is the limit of a tenant, None for no limit;
    it may change, after which `apply_limits` is to be called. `agents` have limits of their own; by
    default there is one, which is ready.
    """

    def __init__(
        self,
        total: int,
        on_grant: Callable[[SessionKey], None],
        limit_of: Callable[[str], int | None] = _no_limit,
        agents: AgentRoom | None = None,
    ) -> None:
        self.agents = agents or AgentRoom({DEFAULT_AGENT: None}, ready=(DEFAULT_AGENT,))
        self._free = total
        self._on_grant = on_grant
        self._limit_of = limit_of
        self._is_closed = True
        self._grants = 0
        self._arrivals = count(1)
        self._returns = count(-1, -1)
        # Runs that go on after input come before all others, in order (R41).
        self._resumptions = count(-(1 << 62))
        self._tenants: dict[str, _Tenant] = {}
        # The tenants with a queue. While open, no slot is free that one of them could use.
        self._waiting: dict[str, _Tenant] = {}
        # All lanes in queues, each with its agent.
        self._queued: dict[SessionKey, Agent] = {}
        self._granted: dict[SessionKey, Agent] = {}
        self._in_use: dict[SessionKey, str] = {}

    @property
    def in_use(self) -> int:
        """The number of slots in use."""
        return len(self._in_use)

    @property
    def free(self) -> int:
        """The number of further lanes that could get a slot now, besides those in the queue."""
        if self._is_closed or self.agents.left(None) <= 0:
            return 0
        queued = sum(
            min(self._startable(tenant, it), self._allowance(tenant, it))
            for tenant, it in self._waiting.items()
        )
        return max(0, self._free - queued)

    @property
    def queue(self) -> tuple[SessionKey, ...]:
        """The lanes that wait for a slot or were granted one."""
        return (*self._granted, *self._queued)

    def queue_of(self, agent: str) -> tuple[SessionKey, ...]:
        """Those of them whose next run is for an agent, or may be."""
        all_ = (*self._granted.items(), *self._queued.items())
        return tuple(lane for lane, its in all_ if its is None or its == agent)

    @property
    def tenant_shares(self) -> tuple[TenantShare, ...]:
        """The tenants that used slots recently, the next one to serve first, each with the number
        of further lanes it may start besides those in the queue. Tenants not listed here come
        before them."""
        known = sorted(self._tenants.items(), key=lambda item: (item[1].slots, item[1].last_grant))
        return tuple(
            TenantShare(tenant, max(0, self._allowance(tenant, it) - self._startable(tenant, it)))
            for tenant, it in known
        )

    def agent_share(self, agent: str) -> AgentShare:
        """The number of further lanes that an agent can serve, besides those in the queue."""
        queued = sum(
            len(it.queues.get(agent, ()))
            for tenant, it in self._waiting.items()
            if self.agents.serves(agent, tenant)
        )
        return AgentShare(agent, max(0, self.agents.left(agent) - queued))

    def is_queued(self, lane: SessionKey) -> bool:
        """Whether a lane waits for a slot, or was granted one that it has not taken yet."""
        return lane in self._granted or lane in self._queued

    def open(self) -> None:
        """Starts granting slots."""
        self._is_closed = False
        self._grant_free()

    def open_agent(self, agent: str) -> None:
        """Starts granting slots to lanes whose next run is for an agent."""
        self.agents.set_ready(agent)
        self._grant_free()

    def add_offered(self, agent: str, slots: int) -> None:
        """Changes the number of slots that workers offer or use for an agent; `grant_offered` is to
        be called when all agents of an offer are counted."""
        self.agents.add_offered(agent, slots)

    def grant_offered(self) -> None:
        """Grants slots that workers have offered."""
        self._grant_free()

    def close(self) -> None:
        """Stops granting slots. Slots in use stay in use until they are released."""
        self._is_closed = True
        for lane, agent in reversed(self._granted.items()):
            self._put_back(lane, agent)
            self._join_queue(lane, agent, at_head=True)
        self._granted.clear()

    def apply_limits(self) -> None:
        """Grants free slots after the limits of tenants have changed."""
        self._grant_free()

    def take(self, lane: SessionKey, agent: str = DEFAULT_AGENT, *, resuming: bool = False) -> bool:
        """Takes a slot for a lane that is about to start a run of an agent, or to go on with one
        after input; queues the lane if none is free.

        A lane whose run has just ended keeps its slot unless another lane waits that could use it.
        """
        if lane in self._granted:
            return self._use_grant(lane, agent, resuming=resuming)
        if not self._is_closed:
            if self._can_keep(lane, agent):
                self._keep(lane, agent)
                return True
            if self._can_take(lane, agent):
                self._leave_queue(lane)
                self._acquire(lane, agent)
                self._in_use[lane] = agent
                return True
        self._join_queue(lane, agent, resuming=resuming)
        return False

    def _keep(self, lane: SessionKey, agent: str) -> None:
        """Uses the slot of a lane for its next run."""
        used, self._in_use[lane] = self._in_use[lane], agent
        if used == agent:
            self.agents.reserve(agent, lane)
            return
        self.agents.put_back(used)
        self.agents.take(agent)
        # What was reserved for its last run, which may have ended before a worker had it.
        self.agents.give_back(used, lane)
        self.agents.reserve(agent, lane)
        self._grant_free()

    def _use_grant(self, lane: SessionKey, agent: str, *, resuming: bool) -> bool:
        """Uses a grant, which may be for another agent if the next run has changed since."""
        if lane in self._in_use:
            # It was granted while the end of the last run was being committed, which failed.
            self._leave_used(lane)
            self._grant_free()
        granted = self._granted.pop(lane)
        if granted != agent:
            self.agents.put_back(granted)
            self.agents.give_back(granted, lane)
            if self._left(agent, lane.tenant) <= 0:
                self._free += 1
                self._tenants[lane.tenant].slots -= 1
                self._join_queue(lane, agent, resuming=resuming)
                self._grant_free()
                return False
            self.agents.take(agent)
            self.agents.reserve(agent, lane)
            self._in_use[lane] = agent
            self._grant_free()
        self._in_use[lane] = agent
        return True

    def occupy(self, lane: SessionKey, agent: str = DEFAULT_AGENT) -> None:
        """Takes a slot for a lane that already has an active run, even if none is free."""
        self._leave_queue(lane)
        if lane in self._in_use:
            return
        if lane in self._granted:
            self._put_back(lane, self._granted.pop(lane))
        # Its worker, if it has one, is to reconnect with a slot of its own.
        self._count(lane, agent)
        self._in_use[lane] = agent
        self._grant_free()

    def enqueue(self, lane: SessionKey, agent: Agent = None) -> None:
        """Queues a lane that has waiting runs, the next one for an agent."""
        if lane in self._granted or (lane in self._in_use and not self._is_closed):
            # With a second slot one of the two would never be free again. The lane may have changed
            # since it was looked at for this one.
            self._on_grant(lane)
            return
        self._join_queue(lane, agent)
        self._grant_free()

    def release(self, lane: SessionKey) -> None:
        """Frees the slots that a lane uses and was granted."""
        self._leave_used(lane)
        if lane in self._granted:
            self._put_back(lane, self._granted.pop(lane))
        self._grant_free()

    def _leave_used(self, lane: SessionKey) -> None:
        """Puts the slot back that a lane uses, but not one that it was granted besides."""
        if lane in self._in_use:
            self._put_back(lane, self._in_use.pop(lane))
            if lane in self._granted:
                self.agents.reserve(self._granted[lane], lane)

    def settle(self, lane: SessionKey, *, running: bool, can_start: bool) -> None:
        """Adjusts slot and queue to the committed lane.

        `running`: the lane has an active run here; `can_start`: it has a run to start.
        """
        if running or not can_start:
            self._leave_queue(lane)
        if not running and can_start and lane in self._in_use and lane in self._granted:
            # It was queued for its next run, and has got the slot for it since.
            self._leave_used(lane)
            self._grant_free()
            self._on_grant(lane)
        elif not running:
            self.release(lane)
        elif lane in self._granted:
            # The grant is superfluous: the lane has a slot, or its run is active on another node.
            self._put_back(lane, self._granted.pop(lane))
            self._grant_free()

    def _can_take(self, lane: SessionKey, agent: str) -> bool:
        """Whether a slot is free for a lane that has none. No queued lane could use it."""
        if lane in self._in_use or self._free <= 0 or self._left(agent, lane.tenant) <= 0:
            return False
        tenant = self._tenants.get(lane.tenant)
        return self._allowance(lane.tenant, tenant or _Tenant()) > 0

    def _can_keep(self, lane: SessionKey, agent: str) -> bool:
        """Whether a lane with a slot may start its next run with it: if it gave the slot back, no
        queued lane could use it, and tenant and agent are not above their limits."""
        if lane not in self._in_use:
            return False
        if not self._waiting and agent == self._in_use[lane]:
            limit = self._limit_of(lane.tenant)
            has_room = limit is None or self._tenants[lane.tenant].slots <= limit
            is_served = self.agents.serves(agent, lane.tenant)
            return has_room and is_served and self.agents.left(agent) >= 0
        tenant, used = self._tenants[lane.tenant], self._in_use[lane]
        tenant.slots -= 1
        self.agents.put_back(used)
        try:
            left = min(self._allowance(lane.tenant, tenant), self._left(agent, lane.tenant))
            return left > 0 and self._next() is None
        finally:
            tenant.slots += 1
            self.agents.take(used)

    def _allowance(self, name: str, tenant: _Tenant) -> int:
        """The number of further slots a tenant may use; negative if it is above its limit."""
        limit = self._limit_of(name)
        return UNLIMITED if limit is None else limit - tenant.slots

    def _left(self, agent: Agent, tenant: str) -> int:
        """The number of further slots that an agent may use for a tenant."""
        return self.agents.left(agent) if self.agents.serves(agent, tenant) else 0

    def _startable(self, name: str, tenant: _Tenant) -> int:
        """The number of a tenant's queued lanes that their agents have room for."""
        return sum(
            min(len(queue), max(0, self._left(agent, name)))
            for agent, queue in tenant.queues.items()
        )

    def _next(self) -> SessionKey | None:
        """The lane to serve next: of the tenants below their limit that have a lane whose agent has
        room, the first in the order of service, and its longest waiting such lane."""
        eligible = (
            (tenant.slots, tenant.last_grant, name, lane)
            for name, tenant in self._waiting.items()
            if self._allowance(name, tenant) > 0 and (lane := self._head(name, tenant)) is not None
        )
        return min(eligible, default=(0, 0, "", None))[3]

    def _head(self, name: str, tenant: _Tenant) -> SessionKey | None:
        """The longest waiting lane of a tenant whose agent has room."""
        heads = [
            next(iter(queue.items()))
            for agent, queue in tenant.queues.items()
            if self._left(agent, name) > 0
        ]
        return min(heads, key=lambda head: head[1])[0] if heads else None

    def _grant_free(self) -> None:
        while self._waiting and self._free > 0 and not self._is_closed:
            lane = self._next()
            if lane is None:
                return
            agent = self._queued[lane]
            self._leave_queue(lane)
            self._acquire(lane, agent)
            self._granted[lane] = agent
            self._on_grant(lane)

    def _acquire(self, lane: SessionKey, agent: Agent) -> None:
        """Takes a free slot for a lane."""
        self._count(lane, agent)
        self.agents.reserve(agent, lane)

    def _count(self, lane: SessionKey, agent: Agent) -> None:
        """Counts a slot for the lane's tenant, which comes last from now on, and for the agent."""
        self._free -= 1
        self._grants += 1
        tenant = self._tenants.get(lane.tenant) or self._tenant_of(lane)
        tenant.slots += 1
        tenant.last_grant = self._grants
        self.agents.take(agent)

    def _put_back(self, lane: SessionKey, agent: Agent) -> None:
        self._free += 1
        self._tenants[lane.tenant].slots -= 1
        self.agents.put_back(agent)
        self.agents.give_back(agent, lane)

    def _tenant_of(self, lane: SessionKey) -> _Tenant:
        tenant = self._tenants.get(lane.tenant)
        if tenant is None:
            if len(self._tenants) >= MAX_TENANTS:
                self._evict()
            tenant = self._tenants[lane.tenant] = _Tenant()
        return tenant

    def _evict(self) -> None:
        """Evicts the oldest tenants that have neither slots nor a queue."""
        idle = [
            (tenant.last_grant, name)
            for name, tenant in self._tenants.items()
            if not (tenant.slots or tenant.queues)
        ]
        for _, name in sorted(idle)[: MAX_TENANTS // 2]:
            del self._tenants[name]

    def _join_queue(
        self, lane: SessionKey, agent: Agent, *, at_head: bool = False, resuming: bool = False
    ) -> None:
        """Queues a lane, at the end unless it waits already: then it keeps its place. One that goes
        on after input comes before those that start a run."""
        place = None
        if lane in self._queued:
            if self._queued[lane] == agent:
                return
            place = self._leave_queue(lane)
        if resuming and (place is None or place > 0):
            place = next(self._resumptions)
        tenant = self._tenant_of(lane)
        queue = tenant.queues.setdefault(agent, {})
        if place is not None:
            ordered = sorted([*queue.items(), (lane, place)], key=lambda item: item[1])
            tenant.queues[agent] = dict(ordered)
        elif at_head:
            tenant.queues[agent] = {lane: next(self._returns), **queue}
        else:
            queue[lane] = next(self._arrivals)
        self._queued[lane] = agent
        self._waiting[lane.tenant] = tenant

    def _leave_queue(self, lane: SessionKey) -> int | None:
        """Removes a lane from its queue; returns its place, None if it was in none."""
        if lane not in self._queued:
            return None
        agent = self._queued.pop(lane)
        tenant = self._waiting[lane.tenant]
        place = tenant.queues[agent].pop(lane)
        if not tenant.queues[agent]:
            del tenant.queues[agent]
            if not tenant.queues:
                del self._waiting[lane.tenant]
        return place
