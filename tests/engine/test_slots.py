"""Slots: tenants share them fairly and within their limits, and no usable slot stays free."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runlane_server.access.quotas import Quota, QuotaBook, Quotas
from runlane_server.core.agents import AgentNames
from runlane_server.core.model import SessionKey
from runlane_server.engine import slots as module
from runlane_server.engine.agent_room import UNLIMITED, AgentRoom
from runlane_server.engine.recovery import claim_order_of
from runlane_server.engine.slots import Slots
from runlane_server.store.base import AgentShare, ClaimOrder, TenantShare

QUIET, NOISY, OTHER = "quiet", "noisy", "other"


def key(tenant: str, number: int = 0) -> SessionKey:
    return SessionKey(tenant, f"s{number}")


class Node:
    """Slots, and lanes that start a run as soon as a slot is granted."""

    def __init__(self, total: int, most: dict[str, int] | None = None) -> None:
        self.most = most or {}
        self.slots = Slots(total, self._called, self.most.get)
        self.called: list[SessionKey] = []
        self.started: list[SessionKey] = []
        self.slots.open()

    def _called(self, lane: SessionKey) -> None:
        self.called.append(lane)

    def arrive(self, *lanes: SessionKey) -> None:
        """Each lane gets a run to start."""
        for lane in lanes:
            if self.slots.take(lane):
                self._start(lane)

    def end(self, lane: SessionKey) -> SessionKey | None:
        """The last run of a lane ends; returns the lane that gets its slot."""
        before = len(self.started)
        self.slots.settle(lane, running=False, can_start=False)
        self.start_called()
        return self.started[-1] if len(self.started) > before else None

    def start_called(self) -> None:
        """The lanes with a granted slot start their runs."""
        while self.called:
            lane = self.called.pop(0)
            assert self.slots.take(lane)
            self._start(lane)

    def _start(self, lane: SessionKey) -> None:
        self.slots.settle(lane, running=True, can_start=False)
        self.started.append(lane)


def tenants(lanes: Sequence[SessionKey]) -> list[str]:
    return [lane.tenant for lane in lanes]


def test_the_tenant_with_the_fewest_slots_is_served_next_despite_ten_thousand_others() -> None:
    node = Node(4)
    node.arrive(*(key(NOISY, n) for n in range(10_000)))
    assert tenants(node.started) == [NOISY] * 4
    node.arrive(key(QUIET))
    assert node.end(key(NOISY, 0)) == key(QUIET)
    assert node.end(key(QUIET)) == key(NOISY, 4)


def test_a_tenant_with_long_runs_does_not_end_up_with_all_slots() -> None:
    """A plain rotation would give all slots to it, because its runs do not end."""
    node = Node(4)
    node.arrive(*(key(NOISY, n) for n in range(9)), *(key(QUIET, n) for n in range(9)))
    assert tenants(node.started) == [NOISY] * 4
    assert node.end(key(NOISY, 0)) == key(QUIET, 0)
    assert node.end(key(NOISY, 1)) == key(QUIET, 1)
    for n in range(7):
        assert node.end(key(QUIET, n)) == key(QUIET, n + 2)


def test_tenants_with_equally_many_slots_alternate() -> None:
    node = Node(1)
    node.arrive(key(OTHER, 99))
    everyone = [key(tenant, n) for tenant in (NOISY, QUIET, OTHER) for n in range(3)]
    node.arrive(*everyone)
    order = [node.end(key(OTHER, 99))]
    while order[-1] is not None:
        order.append(node.end(order[-1]))
    assert tenants([lane for lane in order if lane]) == [NOISY, QUIET, OTHER] * 3


def test_within_a_tenant_the_longest_waiting_lane_is_served_first() -> None:
    node = Node(1)
    node.arrive(*(key(NOISY, n) for n in (5, 3, 8, 1)))
    order = [node.end(key(NOISY, 5)), node.end(key(NOISY, 3)), node.end(key(NOISY, 8))]
    assert order == [key(NOISY, 3), key(NOISY, 8), key(NOISY, 1)]


def test_a_tenant_at_its_limit_is_passed_over() -> None:
    node = Node(4, {NOISY: 2})
    node.arrive(*(key(NOISY, n) for n in range(9)))
    assert len(node.started) == 2
    # Two slots are free that the queued lanes cannot use.
    assert node.slots.free == 2
    node.arrive(key(QUIET, 0), key(QUIET, 1), key(QUIET, 2))
    assert tenants(node.started) == [NOISY, NOISY, QUIET, QUIET]
    assert node.end(key(QUIET, 0)) == key(QUIET, 2)
    assert node.end(key(NOISY, 0)) == key(NOISY, 2)


def test_a_raised_limit_applies_at_once_and_a_lowered_one_as_runs_end() -> None:
    node = Node(4, {NOISY: 1})
    node.arrive(*(key(NOISY, n) for n in range(9)))
    node.most[NOISY] = 3
    node.slots.apply_limits()
    node.start_called()
    assert len(node.started) == 3
    node.most[NOISY] = 1
    assert [node.end(key(NOISY, n)) for n in range(2)] == [None, None]
    assert node.end(key(NOISY, 2)) == key(NOISY, 3)


def test_a_lane_keeps_its_slot_unless_a_waiting_lane_could_use_it() -> None:
    node = Node(1, {NOISY: 1, QUIET: 0})
    node.arrive(key(NOISY), key(QUIET))
    assert node.slots.take(key(NOISY))
    node.most[QUIET] = 1
    assert not node.slots.take(key(NOISY))
    node.slots.settle(key(NOISY), running=False, can_start=True)
    assert node.called == [key(QUIET)]


def test_a_lane_releases_its_slot_when_its_tenant_is_above_its_limit() -> None:
    node = Node(2, {NOISY: 2})
    node.arrive(key(NOISY, 0), key(NOISY, 1))
    node.most[NOISY] = 1
    assert not node.slots.take(key(NOISY, 0))
    node.slots.settle(key(NOISY, 0), running=False, can_start=True)
    assert (node.called, node.slots.in_use) == ([], 1)
    node.slots.settle(key(NOISY, 0), running=False, can_start=False)
    assert node.slots.take(key(NOISY, 1))


def test_tenant_shares_are_ordered_by_slots_and_last_grant() -> None:
    node = Node(8, {NOISY: 3})
    node.arrive(key(NOISY, 0), key(QUIET), key(OTHER), key(NOISY, 1))
    node.end(key(QUIET))
    assert node.slots.tenant_shares == (
        TenantShare(QUIET, UNLIMITED),
        TenantShare(OTHER, UNLIMITED),
        TenantShare(NOISY, 1),
    )
    node.arrive(key(NOISY, 2), key(NOISY, 3))
    assert node.slots.tenant_shares[-1] == TenantShare(NOISY, 0)


def test_the_claim_order_starts_with_tenants_that_have_used_no_slot() -> None:
    book = QuotaBook(Quotas({NOISY: Quota(max_active_runs=2), "fresh": Quota(max_active_runs=7)}))
    slots = Slots(8, lambda _: None, book.max_active)
    slots.open()
    for lane in (key(NOISY), key(QUIET)):
        assert slots.take(lane)
    slots.settle(key(QUIET), running=False, can_start=False)
    told = (TenantShare("fresh", 7), TenantShare(QUIET, UNLIMITED), TenantShare(NOISY, 1))
    assert claim_order_of(slots, book) == ClaimOrder(told, UNLIMITED)
    book.replace(Quotas({}, others=Quota(max_active_runs=1)))
    assert claim_order_of(slots, book) == ClaimOrder(
        (TenantShare(QUIET, 1), TenantShare(NOISY, 0)), 1
    )


def test_idle_tenants_are_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TENANTS", 10)
    node = Node(2)
    node.arrive(key(QUIET))
    for n in range(100):
        node.arrive(key(f"t{n}"))
        node.end(key(f"t{n}"))
    known = [share.tenant for share in node.slots.tenant_shares]
    assert len(known) <= 10
    assert {QUIET, "t99"} <= set(known)


# --- Agents -------------------------------------------------------------------------------------


class Agents:
    """Slots of two agents; lanes that are granted one take it at once."""

    def __init__(self, total: int, **limits: int | None) -> None:
        self.room = AgentRoom(limits)
        self.slots = Slots(total, self._called, agents=self.room)
        self.started: list[SessionKey] = []
        self._agents: dict[SessionKey, str] = {}
        self.slots.open()

    def _called(self, lane: SessionKey) -> None:
        self.arrive(self._agents[lane], lane)

    def arrive(self, agent: str, *lanes: SessionKey) -> None:
        for lane in lanes:
            self._agents[lane] = agent
            if self.slots.take(lane, agent):
                self.slots.settle(lane, running=True, can_start=False)
                self.started.append(lane)

    def end(self, lane: SessionKey) -> None:
        self.slots.settle(lane, running=False, can_start=False)


def test_r32_lanes_wait_until_their_agent_is_ready_and_others_pass_them() -> None:
    node = Agents(2, a=None, b=None)
    node.arrive("a", *(key(NOISY, n) for n in range(5)))
    assert (node.started, node.slots.free) == ([], 0)
    node.slots.open_agent("b")
    assert node.slots.free == 2
    node.arrive("b", key(NOISY, 9))
    assert node.started == [key(NOISY, 9)]
    node.slots.open_agent("a")
    assert node.started == [key(NOISY, 9), key(NOISY, 0)]
    node.end(key(NOISY, 9))
    assert node.started[2:] == [key(NOISY, 1)]


def test_r32_an_agent_at_its_limit_leaves_its_slots_to_others() -> None:
    node = Agents(4, a=1, b=None)
    node.slots.open_agent("a")
    node.slots.open_agent("b")
    node.arrive("a", key(NOISY, 0), key(NOISY, 1), key(NOISY, 2))
    node.arrive("b", key(NOISY, 3))
    assert node.started == [key(NOISY, 0), key(NOISY, 3)]
    assert [node.slots.agent_share(name).room for name in "ab"] == [0, UNLIMITED]
    node.end(key(NOISY, 3))
    assert len(node.started) == 2
    node.end(key(NOISY, 0))
    assert node.started[2:] == [key(NOISY, 1)]


def test_r32_a_lane_keeps_its_slot_for_the_next_run_only_if_that_agent_has_room() -> None:
    node = Agents(4, a=1, b=None)
    node.slots.open_agent("a")
    node.slots.open_agent("b")
    node.arrive("a", key(NOISY))
    node.arrive("b", key(QUIET))
    assert node.slots.take(key(QUIET), "b")
    assert not node.slots.take(key(QUIET), "a")
    node.slots.settle(key(QUIET), running=False, can_start=True)
    assert (node.slots.in_use, node.room.in_use("a"), node.room.in_use("b")) == (1, 1, 0)
    # The next run of its own session may take the slot of the agent: nobody else waits longer.
    node._agents[key(QUIET)] = "a"
    node.end(key(NOISY))
    assert node.started[2:] == [key(QUIET)]


def test_r32_a_lane_whose_next_run_changes_moves_to_the_other_agent() -> None:
    node = Agents(1, a=None, b=None)
    node.slots.open_agent("b")
    node.arrive("b", key(OTHER))
    node.arrive("a", key(NOISY, 0))
    node.arrive("b", key(NOISY, 1))
    # It keeps its place: it has waited for longer than the other.
    node.arrive("b", key(NOISY, 0))
    assert node.slots.queue_of("a") == ()
    node.end(key(OTHER))
    node.end(key(NOISY, 0))
    assert node.started == [key(OTHER), key(NOISY, 0), key(NOISY, 1)]


def test_r32_a_grant_that_its_agent_cannot_use_goes_to_another_lane() -> None:
    """The agent of a lane is known only once the lane is loaded."""
    node = Agents(1, a=None, b=None)
    node.slots.open_agent("b")
    unknown = key(NOISY, 0)
    node._agents[unknown] = "a"
    node.slots.enqueue(unknown)
    assert node.started == []
    assert node.slots.queue_of("a") == (unknown,)
    node.arrive("b", key(NOISY, 1))
    assert node.started == [key(NOISY, 1)]


def test_r32_the_claim_order_names_the_agents_with_room() -> None:
    node = Agents(8, a=2, b=None, c=None)
    node.slots.open_agent("a")
    node.slots.open_agent("b")
    node.arrive("a", key(NOISY))
    order = claim_order_of(node.slots, QuotaBook(), AgentNames(("a", "b", "c"), "a"))
    assert order.agents == (AgentShare("", 1), AgentShare("a", 1), AgentShare("b", UNLIMITED))


# --- Random histories ---------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Lanes arrive, get slots, start and end in any order, while commits fail and limits change.

    A plain model beside the slots records which lane has what.
    """

    LANES = [key(tenant, n) for tenant in (QUIET, NOISY, OTHER) for n in range(4)]  # noqa: RUF012

    @initialize(total=st.integers(1, 5), most=st.lists(st.integers(0, 4), min_size=2, max_size=2))
    def begin(self, total: int, most: list[int]) -> None:
        self.total = total
        self.most = {QUIET: most[0], NOISY: most[1]}
        self.called: list[SessionKey] = []
        self.running: set[SessionKey] = set()
        self.wanting: set[SessionKey] = set()
        self.beyond = 0
        self.open = False
        self.slots = Slots(total, self.called.append, self.most.get)

    def _decide(self, lane: SessionKey, *, committed: bool) -> None:
        """A lane with a run to start takes a slot, as `Lanes` does."""
        got = self.slots.take(lane)
        if not committed:
            if lane not in self.running:
                self.slots.release(lane)
                self.slots.enqueue(lane)
            return
        self.running.discard(lane)
        self.wanting.discard(lane)
        (self.running if got else self.wanting).add(lane)
        self.slots.settle(lane, running=got, can_start=not got)

    @rule()
    def open_up(self) -> None:
        self.slots.open()
        self.open = True

    @rule()
    def shut(self) -> None:
        self.slots.close()
        self.called.clear()
        self.open = False

    @rule(lane=st.sampled_from(LANES), committed=st.booleans())
    def arrives(self, lane: SessionKey, *, committed: bool) -> None:
        if lane not in self.running:
            if lane in self.called:
                self.called.remove(lane)
            self.wanting.add(lane)
            self._decide(lane, committed=committed)

    @precondition(lambda self: self.called)
    @rule(committed=st.booleans())
    def starts(self, *, committed: bool) -> None:
        self._decide(self.called.pop(0), committed=committed)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), more=st.booleans())
    def ends(self, data: st.DataObject, *, more: bool) -> None:
        lane = data.draw(st.sampled_from(sorted(self.running)))
        if more:
            self._decide(lane, committed=True)
        else:
            self.running.discard(lane)
            self.slots.settle(lane, running=False, can_start=False)

    @precondition(lambda self: self.wanting)
    @rule(data=st.data())
    def is_cancelled(self, data: st.DataObject) -> None:
        lane = data.draw(st.sampled_from(sorted(self.wanting)))
        if lane in self.called:
            self.called.remove(lane)
        self.wanting.discard(lane)
        self.slots.settle(lane, running=False, can_start=False)

    @rule(lane=st.sampled_from(LANES))
    def is_taken_up(self, lane: SessionKey) -> None:
        """A restored active run gets a slot even if none is free."""
        if lane not in self.running:
            if lane in self.called:
                self.called.remove(lane)
            self.running.add(lane)
            self.wanting.discard(lane)
            self.slots.occupy(lane)

    @rule(tenant=st.sampled_from([QUIET, NOISY]), most=st.integers(0, 4))
    def limit_changes(self, tenant: str, most: int) -> None:
        self.most[tenant] = most
        self.slots.apply_limits()

    def _held(self, tenant: str) -> int:
        lanes = {*self.running, *self.called}
        return sum(lane.tenant == tenant for lane in lanes)

    @invariant()
    def the_account_is_right(self) -> None:
        if hasattr(self, "slots"):
            assert self.slots.in_use == len(self.running)
            assert set(self.slots.queue) == self.wanting
            assert self.slots._free == self.total - len(self.running) - len(self.called)

    @invariant()
    def no_slot_is_free_that_somebody_in_line_could_have(self) -> None:
        if not hasattr(self, "slots") or not self.open:
            return
        if len(self.running) + len(self.called) >= self.total:
            return
        for lane in self.wanting - set(self.called):
            assert self._held(lane.tenant) >= self.most.get(lane.tenant, UNLIMITED), lane

    @precondition(lambda self: self.open)
    @rule(lane=st.sampled_from(LANES))
    def nobody_gets_more_than_it_may(self, lane: SessionKey) -> None:
        """A slot is taken only if one was free and the tenant was below its limit."""
        if lane in self.running or lane in self.called:
            return
        had, total = self._held(lane.tenant), len(self.running) + len(self.called)
        self.wanting.add(lane)
        self._decide(lane, committed=True)
        if lane in self.running:
            assert had < self.most.get(lane.tenant, UNLIMITED)
            assert total < self.total


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


@settings(max_examples=200, deadline=None)
@given(
    total=st.integers(1, 4),
    crowd=st.integers(1, 6),
    ends=st.lists(st.integers(0, 3), min_size=40, max_size=40),
)
def test_every_waiting_tenant_gets_a_slot_before_another_gets_two(
    total: int, crowd: int, ends: list[int]
) -> None:
    """A tenant without slots starts a run before any other tenant has started two."""
    node = Node(total)
    crowded = [f"t{n}" for n in range(crowd)]
    node.arrive(key(QUIET))
    for tenant in crowded:
        node.arrive(*(key(tenant, n) for n in range(60)))
    # It was served last, and most others have not been served.
    node.end(key(QUIET))
    running = [lane for lane in node.started if lane.tenant != QUIET]
    assert len(running) == total
    node.arrive(key(QUIET))
    since: list[str] = []
    for which in ends:
        started = node.end(running.pop(which % len(running)))
        assert started is not None
        if started.tenant == QUIET:
            break
        running.append(started)
        since.append(started.tenant)
    else:
        pytest.fail("the tenant starves")
    assert all(since.count(tenant) <= 1 for tenant in crowded)


# --- Agents of workers, which work for some tenants only ------------------------------------------


@dataclass(frozen=True)
class Offered:
    """Slots of workers for some tenants; they are counted, and none is reserved."""

    tenants: Collection[str]

    def offers_to(self, agent: str, tenant: str) -> bool:
        """Whether a worker works for the tenant."""
        return tenant in self.tenants

    def reserve(self, agent: str, lane: SessionKey) -> None:
        """Does nothing."""

    def give_back(self, lane: SessionKey) -> None:
        """Does nothing."""


def of_workers(total: int, *tenants: str, offered: int = 1, other: int | None = None) -> Slots:
    """Slots of a node with a worker of agent `w` for these tenants, and an agent of its own."""
    room = AgentRoom({"w": None, "own": other}, ready=("w", "own"))
    room.set_offered("w", Offered(tenants))
    slots = Slots(total, _ignore, agents=room)
    slots.open()
    slots.add_offered("w", offered)
    return slots


def _ignore(_: SessionKey) -> None:
    """The test looks at the queue itself."""


def test_r32_a_lane_of_an_unknown_agent_gets_no_slot_of_a_worker_of_other_tenants() -> None:
    slots = of_workers(2, QUIET)
    slots.enqueue(key(NOISY))
    assert not slots.take(key(NOISY), "w")
    assert slots.take(key(QUIET), "w")
    assert slots.in_use == 1


@pytest.mark.parametrize("waiting", [(), (key(OTHER),)], ids=["alone", "others wait"])
@pytest.mark.parametrize("before", ["w", "own"])
def test_r32_a_lane_keeps_no_slot_of_a_worker_that_has_left_its_tenant(
    before: str, waiting: Sequence[SessionKey]
) -> None:
    served = {QUIET, OTHER}
    room = AgentRoom({"w": None, "own": None}, ready=("w", "own"))
    room.set_offered("w", Offered(served))
    slots = Slots(1, _ignore, agents=room)
    slots.open()
    slots.add_offered("w", 2)
    assert slots.take(key(QUIET), before)
    for lane in waiting:
        assert not slots.take(lane, "nobody")
    served.discard(QUIET)
    assert not slots.take(key(QUIET), "w")


def test_r41_a_run_that_goes_on_keeps_its_place_if_its_grant_is_for_another_agent() -> None:
    slots = of_workers(1, QUIET, offered=0)
    assert not slots.take(key(QUIET, 1), "w")
    slots.enqueue(key(QUIET, 2))
    # The lane was granted a slot before its agent was known; its agent has none.
    assert not slots.take(key(QUIET, 2), "w", resuming=True)
    assert slots.queue == (key(QUIET, 1), key(QUIET, 2))
    slots.add_offered("w", 1)
    slots.grant_offered()
    assert slots.take(key(QUIET, 2), "w")


def test_r32_lanes_that_no_worker_serves_take_no_room_from_others() -> None:
    slots = of_workers(2, QUIET)
    assert not slots.take(key(NOISY), "w")
    assert slots.agent_share("w") == AgentShare("w", 1)
    assert slots.take(key(QUIET), "w")
    assert slots.agent_share("w") == AgentShare("w", 0)


def test_r32_a_lane_that_is_queued_again_before_it_uses_its_grant_has_one_slot() -> None:
    node, lane = Node(2), key(QUIET)
    node.slots.enqueue(lane)
    node.slots.enqueue(lane)
    # It may have changed since.
    assert node.called == [lane, lane]
    assert node.slots.free == 1
    node.slots.settle(lane, running=False, can_start=False)
    assert node.slots.free == 2


def test_r32_a_lane_with_a_run_that_is_queued_again_has_one_slot() -> None:
    """The store was away when the end of its run was committed."""
    node, lane = Node(2), key(QUIET)
    node.arrive(lane)
    node.slots.enqueue(lane)
    assert node.called == [lane]
    assert node.slots.free == 1
    node.slots.settle(lane, running=False, can_start=False)
    assert (node.slots.free, node.slots.in_use) == (2, 0)


def granted_while_it_ends(node: Node) -> SessionKey:
    """A lane that is granted a slot while the end of its run is being committed."""
    lane, first, last = key(QUIET, 0), key(NOISY, 0), key(NOISY, 1)
    node.arrive(lane, first, last)
    assert not node.slots.take(lane)
    assert node.end(first) == last
    node.called.clear()
    node.slots.settle(last, running=False, can_start=False)
    assert node.called == [lane]
    return lane


def test_r32_a_grant_replaces_the_slot_of_a_run_whose_end_was_not_committed() -> None:
    node = Node(2)
    lane = granted_while_it_ends(node)
    node.arrive(key(OTHER))
    assert node.slots.take(lane)
    node.slots.settle(lane, running=True, can_start=False)
    # The slot of the run that has ended goes to the lane that waits for one.
    assert node.called == [lane, key(OTHER)]
    node.called.clear()
    node.end(key(OTHER))
    node.end(lane)
    assert (node.slots._free, node.slots.in_use) == (2, 0)


def test_r32_a_lane_without_a_run_leaves_its_grant_and_the_slot_of_its_last_run() -> None:
    node = Node(2)
    lane = granted_while_it_ends(node)
    node.slots.settle(lane, running=False, can_start=False)
    assert (node.slots._free, node.slots.in_use) == (2, 0)


def test_r32_a_lane_that_is_granted_a_slot_while_its_run_ends_starts_the_next_with_it() -> None:
    node = Node(2)
    lane = granted_while_it_ends(node)
    node.called.clear()
    node.slots.settle(lane, running=False, can_start=True)
    assert (node.slots._free, node.slots.in_use, node.called) == (1, 0, [lane])
    assert node.slots.take(lane)
    assert node.slots.free == 1


def test_r32_a_node_that_gives_a_lane_up_frees_its_grant_and_its_slot() -> None:
    node = Node(2)
    node.slots.release(granted_while_it_ends(node))
    assert (node.slots._free, node.slots.in_use) == (2, 0)
