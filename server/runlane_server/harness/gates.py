"""Gates: a harness arms one at a named point of a run's execution, and the run waits there.

Without an armed gate nothing waits. Every point is one where a run may be delayed anyway, only
never for so long; so a gate cannot stage an order of events that could not happen without it.
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
    """The points at which a run can be held; `proto/runlane/harness/v1` defines each."""

    BEFORE_AGENT_READY = "before_agent_ready"
    ACCEPT_COMMITTED = "accept_committed"
    BEFORE_ACTIVE = "before_active"
    HANDOFF = "handoff"
    BEFORE_FIRST_MESSAGE = "before_first_message"
    BEFORE_STEP = "before_step"
    BEFORE_FINISH = "before_finish"


class Arrival(NamedTuple):
    """A run that reached a gate. Both ids are empty at BEFORE_AGENT_READY, which holds no run."""

    session_id: str
    run_id: str


class GateSpec(NamedTuple):
    """The settings of a gate: its point, and the session and run that it holds; empty means any."""

    gate_id: str
    point: Point
    session_id: str = ""
    run_id: str = ""

    def matches(self, point: Point, session_id: str, run_id: str) -> bool:
        """Whether the gate holds this run at this point."""
        return (
            point is self.point
            and self.session_id in {"", session_id}
            and self.run_id in {"", run_id}
        )


@dataclass(slots=True)
class Gate:
    """An armed gate.

    `arrivals` are the runs that reached it, in order. `lanes` are those that the gate keeps from
    starting their next run. `changed` is set at the next arrival and at the release; `opened` is
    set once the gate holds runs no longer.
    """

    spec: GateSpec
    arrivals: dict[Arrival, None] = field(default_factory=dict)
    lanes: set[SessionKey] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    def add_arrival(self, arrival: Arrival) -> None:
        """Records a run. A run may arrive repeatedly, as its lane is checked often; once counts."""
        if arrival not in self.arrivals:
            self.arrivals[arrival] = None
            self.notify_waiters()

    def notify_waiters(self) -> None:
        """Makes every waiter for arrivals check again."""
        self.changed.set()
        self.changed = asyncio.Event()


def _ignore(_: SessionKey) -> None:
    """Does nothing: no lane waits before a coordinator uses the gates."""


class Gates:
    """The armed gates of a node. They survive a restart of the node within the process.

    `on_open` is called with each lane that may start its next run again.
    """

    def __init__(self, specs: Sequence[GateSpec] = ()) -> None:
        self.on_open: Callable[[SessionKey], None] = _ignore
        self._numbers = itertools.count(1)
        self._gates = {spec.gate_id: Gate(spec) for spec in specs}
        self._suspended = False

    def __iter__(self) -> Iterator[Gate]:
        """The armed gates in the order in which they were armed, unaffected by later changes."""
        return iter(tuple(self._gates.values()))

    # --- For the harness ------------------------------------------------------------------------

    def arm(self, point: Point, session_id: str = "", run_id: str = "") -> Gate:
        """Arms a new gate: matching runs wait at the point until the gate is released."""
        gate_id = next(name for n in self._numbers if (name := f"gate-{n}") not in self._gates)
        gate = self._gates[gate_id] = Gate(GateSpec(gate_id, point, session_id, run_id))
        return gate

    async def wait_for_arrivals(self, gate_id: str, count: int) -> tuple[Arrival, ...]:
        """Waits until at least `count` runs have reached a gate; returns all that have.

        Raises GateNotFound if there is no such gate or it is released meanwhile.
        """
        while True:
            gate = self._gate(gate_id)
            if len(gate.arrivals) >= count:
                return tuple(gate.arrivals)
            await gate.changed.wait()

    def release(self, gate_id: str) -> None:
        """Removes a gate and lets its runs continue. Raises GateNotFound."""
        gate = self._gate(gate_id)
        del self._gates[gate_id]
        gate.notify_waiters()
        self._open(gate)

    def _gate(self, gate_id: str) -> Gate:
        gate = self._gates.get(gate_id)
        if gate is None:
            raise GateNotFound.of(gate_id, self._gates)
        return gate

    # --- Shutdown and start of the node ---------------------------------------------------------

    def suspend(self) -> None:
        """Holds no run from now on: a shutdown must not wait for a harness."""
        self._suspended = True
        for gate in self:
            self._open(gate)

    def resume(self) -> None:
        """Holds runs again at the gates that are still armed."""
        self._suspended = False
        for gate in self:
            gate.opened = asyncio.Event()

    def _open(self, gate: Gate) -> None:
        gate.opened.set()
        for lane in gate.lanes:
            self.on_open(lane)
        gate.lanes.clear()

    # --- For the engine -------------------------------------------------------------------------

    async def wait_at(self, point: Point, session_id: str = "", run_id: str = "") -> None:
        """Returns once no gate holds this run at this point."""
        while self._gates and (holding := self._holding(point, session_id, run_id)):
            for gate in holding:
                gate.add_arrival(Arrival(session_id, run_id))
            await holding[0].opened.wait()

    def can_start(self, key: SessionKey, run_id: str, *, follows: bool) -> bool:
        """Whether a lane may start its next run; `follows` if its last run ends in this step."""
        return not self._gates or not self._holding_start(key, run_id, follows=follows)

    def hold_start(self, key: SessionKey, run_id: str, *, follows: bool) -> bool:
        """Records the arrival of a lane's next run, to be called once its step is committed.

        Returns whether the run is still held; `on_open` is called when it may start.
        """
        holding = self._holding_start(key, run_id, follows=follows)
        for gate in holding:
            gate.add_arrival(Arrival(key.session_id, run_id))
        if holding:
            holding[0].lanes.add(key)
        return bool(holding)

    def _holding_start(self, key: SessionKey, run_id: str, *, follows: bool) -> list[Gate]:
        # A run that reached HANDOFF stays there, however often its lane is checked; once it is
        # released, it comes to BEFORE_ACTIVE.
        arrival = Arrival(key.session_id, run_id)
        handoff = self._holding(Point.HANDOFF, *arrival)
        holding = [gate for gate in handoff if follows or arrival in gate.arrivals]
        return holding or self._holding(Point.BEFORE_ACTIVE, *arrival)

    def _holding(self, point: Point, session_id: str, run_id: str) -> list[Gate]:
        """The gates that hold this run at this point."""
        if self._suspended:
            return []
        return [gate for gate in self if gate.spec.matches(point, session_id, run_id)]
