"""Gates at named points of a run's way, at which a harness may hold it.

Nothing is held unless a gate was armed. What is held stands where it may be in any case, only never
for so long: no order of things can be staged that could not come about by itself.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from runlane_server.core.errors import GateNotFound
from runlane_server.core.model import SessionKey


class Point(StrEnum):
    """Where a run can be held; `proto/runlane/harness/v1` says what each means."""

    BEFORE_AGENT_READY = "before_agent_ready"
    ACCEPT_COMMITTED = "accept_committed"
    BEFORE_ACTIVE = "before_active"
    HANDOFF = "handoff"
    BEFORE_FIRST_MESSAGE = "before_first_message"
    BEFORE_STEP = "before_step"
    BEFORE_FINISH = "before_finish"


class Arrival(NamedTuple):
    """A run that came to a gate; both are empty where it is the agent that is held."""

    session_id: str
    run_id: str


class GateSpec(NamedTuple):
    """What a gate is armed with: where, and for which session and run; empty is any."""

    gate_id: str
    point: Point
    session_id: str = ""
    run_id: str = ""

    def matches(self, point: Point, session_id: str, run_id: str) -> bool:
        """Whether it holds a run that comes to that point."""
        return (
            point is self.point
            and self.session_id in {"", session_id}
            and self.run_id in {"", run_id}
        )


@dataclass(slots=True)
class Gate:
    """A gate: who came to it, which lanes it keeps from starting a run, and what wakes those who
    wait for either."""

    spec: GateSpec
    arrivals: dict[Arrival, None] = field(default_factory=dict)
    lanes: set[SessionKey] = field(default_factory=set)
    came: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    def add_arrival(self, arrival: Arrival) -> None:
        """A run has come; it may come again, as a lane is looked at often."""
        if arrival not in self.arrivals:
            self.arrivals[arrival] = None
            self.wake()

    def wake(self) -> None:
        """Has those look again who wait for arrivals."""
        self.came.set()
        self.came = asyncio.Event()


def _nobody(_: SessionKey) -> None:
    """Wakes no lane."""


class Gates:
    """The gates of a node. It outlives the node where that is started anew in the same process.

    `on_open` is called with each lane that may start its run again.
    """

    def __init__(self, specs: Sequence[GateSpec] = ()) -> None:
        self.on_open: Callable[[SessionKey], None] = _nobody
        self._numbers = itertools.count(1)
        self._gates = {each.gate_id: Gate(each) for each in specs}
        self._suspended = False

    def __iter__(self) -> Iterator[Gate]:
        """The gates that are armed, in the order in which they were."""
        return iter(tuple(self._gates.values()))

    # --- What a harness does --------------------------------------------------------------------

    def arm(self, point: Point, session_id: str = "", run_id: str = "") -> Gate:
        """Closes a gate."""
        gate_id = next(name for n in self._numbers if (name := f"gate-{n}") not in self._gates)
        gate = self._gates[gate_id] = Gate(GateSpec(gate_id, point, session_id, run_id))
        return gate

    async def wait_for_arrivals(self, gate_id: str, count: int) -> tuple[Arrival, ...]:
        """Waits until so many runs have come to a gate; returns all that have.

        Raises GateNotFound, also if it is released meanwhile.
        """
        while True:
            gate = self._gate(gate_id)
            if len(gate.arrivals) >= count:
                return tuple(gate.arrivals)
            await gate.came.wait()

    def release(self, gate_id: str) -> None:
        """Removes a gate. Raises GateNotFound."""
        gate = self._gate(gate_id)
        del self._gates[gate_id]
        gate.wake()
        self._open(gate)

    def _gate(self, gate_id: str) -> Gate:
        gate = self._gates.get(gate_id)
        if gate is None:
            raise GateNotFound.of(gate_id)
        return gate

    # --- What becomes of it while the node goes down --------------------------------------------

    def suspend(self) -> None:
        """Holds nobody from now on: a node that goes down is not to wait for a harness."""
        self._suspended = True
        for gate in self:
            self._open(gate)

    def resume(self) -> None:
        """Holds runs again, at the gates that are armed."""
        self._suspended = False
        for gate in self:
            gate.opened = asyncio.Event()

    def _open(self, gate: Gate) -> None:
        gate.opened.set()
        for lane in gate.lanes:
            self.on_open(lane)
        gate.lanes.clear()

    # --- What a node asks -----------------------------------------------------------------------

    async def wait_at(self, point: Point, session_id: str = "", run_id: str = "") -> None:
        """Returns once no gate holds what comes to this point."""
        while self._gates and (holding := self._holding(point, session_id, run_id)):
            for gate in holding:
                gate.add_arrival(Arrival(session_id, run_id))
            await holding[0].opened.wait()

    def can_start(self, key: SessionKey, run_id: str, *, follows: bool) -> bool:
        """Whether a lane may start its next run; `follows` where its last one ends in this step."""
        return not self._gates or not self._holding_start(key, run_id, follows=follows)

    def hold_start(self, key: SessionKey, run_id: str, *, follows: bool) -> bool:
        """Notes that the run has come so far, once that is committed, and has `on_open` called when
        it may start. Returns whether it is held still."""
        holding = self._holding_start(key, run_id, follows=follows)
        for gate in holding:
            gate.add_arrival(Arrival(key.session_id, run_id))
        if holding:
            holding[0].lanes.add(key)
        return bool(holding)

    def _holding_start(self, key: SessionKey, run_id: str, *, follows: bool) -> list[Gate]:
        # What came to the handoff stays there, however often the lane is looked at; let go, it
        # comes to the other point.
        here = Arrival(key.session_id, run_id)
        handoff = self._holding(Point.HANDOFF, *here)
        holding = [gate for gate in handoff if follows or here in gate.arrivals]
        return holding or self._holding(Point.BEFORE_ACTIVE, *here)

    def _holding(self, point: Point, session_id: str, run_id: str) -> list[Gate]:
        """The gates that hold a run at this point."""
        if self._suspended:
            return []
        return [gate for gate in self if gate.spec.matches(point, session_id, run_id)]
