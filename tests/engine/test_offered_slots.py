"""Slots that workers offer for several agents at once: only one agent can use such a slot (R32)."""

from __future__ import annotations

from functools import partial

import pytest

from rpc.test_worker_stream import LocalDurableTurn
from runlane_server.agents.worker.execution import Execution
from runlane_server.agents.worker.messages import Downstream
from runlane_server.agents.worker.slot import Slot
from runlane_server.agents.worker.workers import Workers
from runlane_server.core.model import SessionKey
from runlane_server.engine.agent_room import AgentRoom
from runlane_server.engine.slots import Slots

A, B, C = (SessionKey("default", name) for name in "abc")


class Offering:
    """The slots of a node whose agents `a` to `c` are executed by workers, and `echo` here."""

    def __init__(self) -> None:
        self.granted: list[SessionKey] = []
        self.workers = Workers()
        agents = ("a", "b", "c", "echo")
        self.room = AgentRoom(dict.fromkeys(agents), ready=agents)
        self.slots = Slots(9, self.granted.append, agents=self.room)
        for agent in ("a", "b", "c"):
            self.room.set_offered(agent, self.workers)
            self.workers.serve(
                agent, partial(self.slots.add_offered, agent), self.slots.grant_offered
            )
        self.slots.open()

    def offer(self, *agents: str) -> Slot:
        """A worker offers a slot."""
        slot = Slot(None, Downstream())
        self.workers.connect(slot)
        slot.begin_offer(agents, "w")
        self.workers.offer(slot)
        return slot

    @property
    def left(self) -> tuple[int, int]:
        """The room of both agents."""
        return self.room.left("a"), self.room.left("b")


def test_r32_a_slot_that_an_agent_takes_is_no_slot_of_the_others() -> None:
    node = Offering()
    node.offer("a", "b")
    assert node.left == (1, 1)
    assert node.slots.take(A, "a")
    assert node.left == (0, 0)
    assert not node.slots.take(B, "b")
    node.offer("b")
    assert node.granted == [B]
    assert node.slots.take(B, "b")
    assert node.left == (0, 0)


def test_r32_the_lane_that_waits_longest_gets_a_slot_for_several_agents() -> None:
    node = Offering()
    assert not node.slots.take(B, "b")
    assert not node.slots.take(A, "a")
    node.offer("a", "b")
    assert node.granted == [B]


def test_a_slot_that_was_not_used_is_offered_to_all_again() -> None:
    node = Offering()
    node.offer("a", "b")
    assert node.slots.take(A, "a")
    assert not node.slots.take(B, "b")
    node.slots.release(A)
    assert node.granted == [B]
    node.slots.release(B)
    assert node.left == (1, 1)


@pytest.mark.parametrize("end", ["disconnect", "withdraw"])
def test_a_worker_that_leaves_takes_its_reserved_slot_along(end: str) -> None:
    node = Offering()
    slot = node.offer("a", "b")
    assert node.slots.take(A, "a")
    getattr(node.workers, end)(slot)
    assert node.left == (-1, 0)
    node.slots.release(A)
    assert node.left == (0, 0)
    node.offer("a", "b")
    assert node.left == (1, 1)


def test_a_grant_for_another_agent_changes_its_reservation() -> None:
    node = Offering()
    node.slots.enqueue(A, "a")
    node.offer("a", "b")
    assert node.granted == [A]
    # Its next run has changed meanwhile.
    assert node.slots.take(A, "b")
    assert node.left == (0, 0)
    assert not node.slots.take(C, "a")


def test_a_run_that_ended_before_its_worker_had_it_leaves_the_offer_to_others() -> None:
    node = Offering()
    node.offer("a")
    assert node.slots.take(A, "a")
    # The next run of its session starts in the commit in which it ends.
    assert node.slots.take(A, "echo")
    assert node.left == (1, 0)
    node.slots.release(A)
    assert node.slots.take(B, "a")


@pytest.mark.parametrize("is_granted", [False, True])
def test_an_offer_that_was_given_back_is_granted_to_those_that_wait_for_it(
    *, is_granted: bool
) -> None:
    node = Offering()
    if is_granted:
        node.slots.enqueue(A, "a")
    node.offer("a", "b")
    assert is_granted or node.slots.take(A, "a")
    assert not node.slots.take(B, "b")
    assert node.slots.take(A, "echo")
    assert node.granted[-1:] == [B]
    assert node.slots.take(B, "b")


async def test_an_offer_that_a_start_from_the_store_gives_back_is_granted() -> None:
    node = Offering()
    node.offer("a", "b")
    assert node.slots.take(A, "a")
    assert not node.slots.take(B, "b")
    node.offer("c")
    # The store has committed another start than the one that this node reserved a slot for.
    execution = Execution(LocalDurableTurn(key=A), "c", lease=60)
    await node.workers.assign(execution)
    assert execution.worker is not None
    assert node.granted == [B]


def test_a_run_that_continues_here_needs_no_offer() -> None:
    node = Offering()
    node.offer("a", "b")
    node.slots.occupy(A, "a")
    assert node.left == (0, 1)
    assert node.slots.take(B, "b")
