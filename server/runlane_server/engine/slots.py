"""The slots of a node, shared fairly between tenants, and the count of waiting runs.

The next free slot goes to the tenant that uses the fewest; among those, to the one whose last grant
is the oldest. Within a tenant the lane that waits longest comes first. Runs last milliseconds or
hours: a plain rotation at the start would give all slots to the tenant with the longest runs. A
tenant at its limit is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain

from runlane_server.core.model import SessionKey
from runlane_server.store.base import TenantShare

MAX_TENANTS = 1_000
"""Number of tenants above which those without slots and without waiting lanes are evicted."""

UNLIMITED = (1 << 31) - 1
"""Stands for no limit: more slots than any node has."""


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
    lanes that wait for a slot, the longest waiting first. Those that go on after input are in
    `resuming` and come before those that start a run."""

    slots: int = 0
    last_grant: int = 0
    queue: dict[SessionKey, None] = field(default_factory=dict)
    resuming: dict[SessionKey, None] = field(default_factory=dict)

    @property
    def waiting(self) -> int:
        """The number of its lanes that wait for a slot."""
        return len(self.queue) + len(self.resuming)

    def __contains__(self, lane: object) -> bool:
        return lane in self.queue or lane in self.resuming

    @property
    def first(self) -> SessionKey:
        """The next of its lanes."""
        return next(iter(self.resuming or self.queue))


def _no_limit(tenant: str) -> int | None:
    return None


class Slots:
    """Grants slots to lanes. A lane that finds no free slot joins the queue of its tenant.

    When its turn comes, `on_grant` is called with the lane; the slot is reserved until the lane
    takes it with `take` or gives it up with `release`. While closed (the agent is not ready, or the
    node drains) no slot is granted. `limit_of` returns the limit of a tenant, None for no limit.
    """

    def __init__(
        self,
        total: int,
        on_grant: Callable[[SessionKey], None],
        limit_of: Callable[[str], int | None] = _no_limit,
    ) -> None:
        self._free = total
        self._on_grant = on_grant
        self._limit_of = limit_of
        self._is_closed = True
        self._grants = 0
        self._tenants: dict[str, _Tenant] = {}
        # The tenants with a queue. While open, no slot is free that one of them could use.
        self._waiting: dict[str, _Tenant] = {}
        self._granted: dict[SessionKey, None] = {}
        self._in_use: set[SessionKey] = set()

    @property
    def in_use(self) -> int:
        """The number of slots in use."""
        return len(self._in_use)

    @property
    def free(self) -> int:
        """The number of further lanes that could get a slot now, besides those in the queue."""
        if self._is_closed:
            return 0
        queued = sum(
            min(it.waiting, self._allowance(tenant, it)) for tenant, it in self._waiting.items()
        )
        return max(0, self._free - queued)

    @property
    def queue(self) -> tuple[SessionKey, ...]:
        """The lanes that wait for a slot or were granted one; within a tenant in order."""
        queues = ((*it.resuming, *it.queue) for it in self._waiting.values())
        return (*self._granted, *chain.from_iterable(queues))

    @property
    def tenant_shares(self) -> tuple[TenantShare, ...]:
        """The tenants that used slots recently, the next one to serve first, each with the number
        of further lanes it may start besides those in the queue. Tenants not listed here come
        before them."""
        known = sorted(self._tenants.items(), key=lambda item: (item[1].slots, item[1].last_grant))
        return tuple(
            TenantShare(tenant, max(0, self._allowance(tenant, it) - it.waiting))
            for tenant, it in known
        )

    def is_queued(self, lane: SessionKey) -> bool:
        """Whether a lane waits for a slot, or was granted one that it has not taken yet."""
        tenant = self._waiting.get(lane.tenant)
        return lane in self._granted or (tenant is not None and lane in tenant)

    def open(self) -> None:
        """Starts granting slots."""
        self._is_closed = False
        self._grant_free()

    def close(self) -> None:
        """Stops granting slots. Slots in use stay in use until they are released."""
        self._is_closed = True
        for lane in reversed(self._granted):
            self._put_back(lane)
            tenant = self._tenants[lane.tenant]
            tenant.queue = {lane: None, **tenant.queue}
            self._waiting[lane.tenant] = tenant
        self._granted.clear()

    def apply_limits(self) -> None:
        """Grants free slots after the limits of tenants have changed."""
        self._grant_free()

    def take(self, lane: SessionKey, *, resuming: bool = False) -> bool:
        """Takes a slot for a lane that is about to start a run, or to go on with one after input;
        queues the lane if none is free.

        A lane whose run has just ended keeps its slot unless another lane waits that could use it.
        """
        if lane in self._granted:
            del self._granted[lane]
            self._in_use.add(lane)
            return True
        if not self._is_closed and (self._can_keep(lane) or self._can_take(lane)):
            if lane not in self._in_use:
                self._acquire(lane)
                self._in_use.add(lane)
            return True
        self._join_queue(lane, resuming=resuming)
        return False

    def occupy(self, lane: SessionKey) -> None:
        """Takes a slot for a lane that already has an active run, even if none is free."""
        if lane in self._granted:
            del self._granted[lane]
        elif lane not in self._in_use:
            self._acquire(lane)
        self._leave_queue(lane)
        self._in_use.add(lane)

    def enqueue(self, lane: SessionKey) -> None:
        """Queues a lane that has waiting runs."""
        self._join_queue(lane)
        self._grant_free()

    def release(self, lane: SessionKey) -> None:
        """Frees the slot that a lane uses or was granted, if there is one."""
        if lane in self._in_use:
            self._in_use.remove(lane)
            self._put_back(lane)
        elif lane in self._granted:
            del self._granted[lane]
            self._put_back(lane)
        self._grant_free()

    def settle(self, lane: SessionKey, *, running: bool, can_start: bool) -> None:
        """Adjusts slot and queue to the committed lane.

        `running`: the lane has an active run here; `can_start`: it has a run to start.
        """
        if running or not can_start:
            self._leave_queue(lane)
        if not running:
            self.release(lane)
        elif lane in self._granted:
            # The grant is superfluous: the lane has a slot, or its run is active on another node.
            del self._granted[lane]
            self._put_back(lane)
            self._grant_free()

    def _can_take(self, lane: SessionKey) -> bool:
        """Whether a slot is free for a lane that has none. No queued lane could use it."""
        if lane in self._in_use or self._free <= 0:
            return False
        tenant = self._tenants.get(lane.tenant)
        return self._allowance(lane.tenant, tenant or _Tenant()) > 0

    def _can_keep(self, lane: SessionKey) -> bool:
        """Whether a lane with a slot may start its next run with it: no queued lane could use the
        slot, and its tenant is not above its limit."""
        if lane not in self._in_use:
            return False
        tenant = self._tenants[lane.tenant]
        return (
            not tenant.waiting
            and self._allowance(lane.tenant, tenant) >= 0
            and self._next_tenant() is None
        )

    def _allowance(self, name: str, tenant: _Tenant) -> int:
        """The number of further slots a tenant may use; negative if it is above its limit."""
        limit = self._limit_of(name)
        return UNLIMITED if limit is None else limit - tenant.slots

    def _next_tenant(self) -> str | None:
        """The tenant to serve next, of those that have a queue and are below their limit."""
        eligible = (
            (tenant.slots, tenant.last_grant, name)
            for name, tenant in self._waiting.items()
            if self._allowance(name, tenant) > 0
        )
        return min(eligible, default=(0, 0, None))[2]

    def _grant_free(self) -> None:
        while self._waiting and self._free > 0 and not self._is_closed:
            name = self._next_tenant()
            if name is None:
                return
            lane = self._waiting[name].first
            self._leave_queue(lane)
            self._acquire(lane)
            self._granted[lane] = None
            self._on_grant(lane)

    def _acquire(self, lane: SessionKey) -> None:
        """Counts a slot for the lane's tenant, which comes last from now on."""
        self._free -= 1
        self._grants += 1
        tenant = self._tenants.get(lane.tenant) or self._tenant_of(lane)
        tenant.slots += 1
        tenant.last_grant = self._grants

    def _put_back(self, lane: SessionKey) -> None:
        self._free += 1
        self._tenants[lane.tenant].slots -= 1

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
            if not (tenant.slots or tenant.waiting)
        ]
        for _, name in sorted(idle)[: MAX_TENANTS // 2]:
            del self._tenants[name]

    def _join_queue(self, lane: SessionKey, *, resuming: bool = False) -> None:
        tenant = self._tenant_of(lane)
        if resuming:
            tenant.queue.pop(lane, None)
            tenant.resuming.setdefault(lane)
        elif lane not in tenant.resuming:
            tenant.queue.setdefault(lane)
        self._waiting[lane.tenant] = tenant

    def _leave_queue(self, lane: SessionKey) -> None:
        tenant = self._waiting.get(lane.tenant) if self._waiting else None
        if tenant is not None:
            tenant.queue.pop(lane, None)
            tenant.resuming.pop(lane, None)
            if not tenant.waiting:
                del self._waiting[lane.tenant]
