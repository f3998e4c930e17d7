"""Who may have an active run on this node: so many lanes at a time, and the tenants take turns.

The next slot goes to the tenant that has the fewest; among those, to the one whose last turn is
longest ago. Within a tenant the lane goes first that waits longest. Runs last milliseconds or
hours: to take turns at starting, without a look at who holds how much, would give all slots to
whoever has the longest runs. A tenant that has as many slots as it may is passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain

from runlane_server.core.model import SessionKey
from runlane_server.store.base import TenantShare

MAX_SERVED = 1_000
"""How many tenants are remembered for the sake of their last turn alone."""

UNLIMITED = (1 << 31) - 1
"""More slots than there are."""


@dataclass(slots=True)
class _Share:
    """What a tenant has: how many slots, taken or granted; the number of its last turn, 0 if it had
    none; and its lanes that wait for a slot."""

    slots: int = 0
    turn: int = 0
    line: dict[SessionKey, None] = field(default_factory=dict)


def _no_limit(tenant: str) -> int | None:
    return None


class Slots:
    """Hands out slots. A lane that finds none free lines up, and is called when it is its turn.

    While it is shut (the agent is not ready, or the node drains) nobody gets a slot. `most` tells
    how many slots a tenant may have; None is without limit.
    """

    def __init__(
        self,
        total: int,
        call: Callable[[SessionKey], None],
        most: Callable[[str], int | None] = _no_limit,
    ) -> None:
        self._free = total
        self._call = call
        self._most = most
        self._shut = True
        self._turns = 0
        self._shares: dict[str, _Share] = {}
        # Those of them that have lanes in line. While it is open, no slot is free that one of them
        # could have.
        self._waiting: dict[str, _Share] = {}
        self._granted: dict[SessionKey, None] = {}
        self._taken: set[SessionKey] = set()

    @property
    def in_use(self) -> int:
        """How many slots are taken."""
        return len(self._taken)

    @property
    def free(self) -> int:
        """How many lanes more could get one now, beyond those in line."""
        if self._shut:
            return 0
        soon = sum(
            min(len(share.line), self._room(tenant, share))
            for tenant, share in self._waiting.items()
        )
        return max(0, self._free - soon)

    @property
    def line(self) -> tuple[SessionKey, ...]:
        """The lanes that wait for a slot; of each tenant the first in line first."""
        lines = (share.line for share in self._waiting.values())
        return (*self._granted, *chain.from_iterable(lines))

    @property
    def tenant_shares(self) -> tuple[TenantShare, ...]:
        """The tenants that had slots of late, the one to come next first, and how many lanes of
        each could get one beyond those in line. Others come before them."""
        known = sorted(self._shares.items(), key=lambda item: (item[1].slots, item[1].turn))
        return tuple(
            TenantShare(tenant, max(0, self._room(tenant, share) - len(share.line)))
            for tenant, share in known
        )

    def lined_up(self, lane: SessionKey) -> bool:
        """Whether a lane waits for a slot."""
        share = self._waiting.get(lane.tenant)
        return lane in self._granted or (share is not None and lane in share.line)

    def open(self) -> None:
        """Begins to hand out slots."""
        self._shut = False
        self._call_next()

    def shut(self) -> None:
        """Hands out no slot from now on. Slots that are taken stay so until they are given back."""
        self._shut = True
        for lane in reversed(self._granted):
            self._release(lane)
            share = self._shares[lane.tenant]
            share.line = {lane: None, **share.line}
            self._waiting[lane.tenant] = share
        self._granted.clear()

    def look_again(self) -> None:
        """Hands out what tenants may have by now: how much that is has changed."""
        self._call_next()

    def take(self, lane: SessionKey) -> bool:
        """Takes a slot for a lane that wants to start a run; if there is none, the lane lines up.

        A lane that has one already, as its run has just ended, keeps it if nobody waits who could
        have it.
        """
        if lane in self._granted:
            del self._granted[lane]
            self._taken.add(lane)
            return True
        if not self._shut and (self._may_keep(lane) or self._may_take(lane)):
            if lane not in self._taken:
                self._acquire(lane)
                self._taken.add(lane)
            return True
        self._join_line(lane)
        return False

    def occupy(self, lane: SessionKey) -> None:
        """Takes a slot for a lane that has an active run already, even if none is free."""
        if lane in self._granted:
            del self._granted[lane]
        elif lane not in self._taken:
            self._acquire(lane)
        self._leave_line(lane)
        self._taken.add(lane)

    def line_up(self, lane: SessionKey) -> None:
        """Puts a lane that has runs waiting into the line."""
        self._join_line(lane)
        self._call_next()

    def give_back(self, lane: SessionKey) -> None:
        """Frees the slot that a lane has, or was called to take; does nothing if it has none."""
        if lane in self._taken:
            self._taken.remove(lane)
            self._release(lane)
        elif lane in self._granted:
            del self._granted[lane]
            self._release(lane)
        self._call_next()

    def settle(self, lane: SessionKey, *, running: bool, startable: bool) -> None:
        """Brings a lane's claims in line with what was committed: whether it has an active run,
        and whether it has one to start."""
        if running or not startable:
            self._leave_line(lane)
        if not running:
            self.give_back(lane)
        elif lane in self._granted:
            # It was called and holds a slot already, or its run is another node's.
            del self._granted[lane]
            self._release(lane)
            self._call_next()

    def _may_take(self, lane: SessionKey) -> bool:
        """Whether there is a slot for a lane that has none. Nobody in line could have it."""
        if lane in self._taken or self._free <= 0:
            return False
        share = self._shares.get(lane.tenant)
        return self._room(lane.tenant, share or _Share()) > 0

    def _may_keep(self, lane: SessionKey) -> bool:
        """Whether a lane that has a slot may go on with it: nobody waits for what it would free,
        and its tenant has no more than it may (any more)."""
        if lane not in self._taken:
            return False
        share = self._shares[lane.tenant]
        return not share.line and self._room(lane.tenant, share) >= 0 and self._next() is None

    def _room(self, tenant: str, share: _Share) -> int:
        """How many slots more a tenant may have, were they free; below 0 if it has too many."""
        most = self._most(tenant)
        return UNLIMITED if most is None else most - share.slots

    def _next(self) -> str | None:
        """The tenant whose turn it is, of those that have lanes in line and may have a slot."""
        fitting = (
            (share.slots, share.turn, tenant)
            for tenant, share in self._waiting.items()
            if self._room(tenant, share) > 0
        )
        return min(fitting, default=(0, 0, None))[2]

    def _call_next(self) -> None:
        while self._waiting and self._free > 0 and not self._shut:
            tenant = self._next()
            if tenant is None:
                return
            lane = next(iter(self._waiting[tenant].line))
            self._leave_line(lane)
            self._acquire(lane)
            self._granted[lane] = None
            self._call(lane)

    def _acquire(self, lane: SessionKey) -> None:
        """A slot is its tenant's; whose turn comes last from now on."""
        self._free -= 1
        self._turns += 1
        share = self._shares.get(lane.tenant) or self._share(lane)
        share.slots += 1
        share.turn = self._turns

    def _release(self, lane: SessionKey) -> None:
        self._free += 1
        self._shares[lane.tenant].slots -= 1

    def _share(self, lane: SessionKey) -> _Share:
        share = self._shares.get(lane.tenant)
        if share is None:
            if len(self._shares) >= MAX_SERVED:
                self._forget()
            share = self._shares[lane.tenant] = _Share()
        return share

    def _forget(self) -> None:
        """Drops most of the tenants of which nothing is here but the number of their last turn."""
        idle = [(it.turn, name) for name, it in self._shares.items() if not (it.slots or it.line)]
        for _, tenant in sorted(idle)[: MAX_SERVED // 2]:
            del self._shares[tenant]

    def _join_line(self, lane: SessionKey) -> None:
        share = self._share(lane)
        share.line.setdefault(lane)
        self._waiting[lane.tenant] = share

    def _leave_line(self, lane: SessionKey) -> None:
        share = self._waiting.get(lane.tenant) if self._waiting else None
        if share is not None:
            share.line.pop(lane, None)
            if not share.line:
                del self._waiting[lane.tenant]
