"""The history of a simulated world, in order.

Ticks order all events; virtual time does not, because many events share one instant.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from proofs.lanecheck.invariants import Broken
from proofs.sim.loop import SimLoop
from runlane_server.core.model import CancelScope, RunEvent, RunKey, WhenBusy
from runlane_server.core.transition import Receipt
from runlane_server.core.update import RunPatch
from runlane_server.store.base import EventFilter, LoggedComplete, Position

OK, LOST = "ok", "lost"

FLEETING = ("d", "e")
"""Sessions that are deleted with their runs, and created again."""


@dataclass(slots=True, eq=False)
class AcceptOp:
    """An accept. `outcome` is OK, the reason of a refusal, or LOST if no answer came."""

    run_id: str
    session_id: str
    prompt: str
    when_busy: WhenBusy
    node: int
    invoked: int
    returned: int | None = None
    outcome: str = LOST
    seq: int = 0
    position: Position = 0


@dataclass(slots=True, eq=False)
class CancelOp:
    """A cancel, identified by its reason; without a session it covers all sessions. `receipts` is
    None if no answer came."""

    reason: str
    scope: CancelScope
    session_id: str | None
    run_id: str
    node: int
    invoked: int
    returned: int | None = None
    at: float = 0.0
    receipts: tuple[Receipt, ...] | None = None


@dataclass(slots=True, eq=False)
class UpdateOp:
    """An update of a run. `outcome` is OK, the reason of a refusal, or LOST if no answer came."""

    run_id: str
    patch: RunPatch
    invoked: int
    outcome: str = LOST

    @property
    def may_reorder(self) -> bool:
        """Whether it may change the order of the starts."""
        return self.patch.move is not None or self.patch.when_busy is WhenBusy.INTERRUPT


@dataclass(slots=True, eq=False)
class ForkOp:
    """A fork of `source`. `turn` is the last one of the copy, once it is made; `may_come_late`: a
    call got no answer."""

    session_id: str
    source: str
    at_turn: int = 0
    outcome: str = LOST
    turn: int | None = None
    may_come_late: bool = False
    is_deleted: bool = False


@dataclass(frozen=True, slots=True)
class SessionChange:
    """A session that comes and goes was created, or it was deleted."""

    tick: int
    session_id: str
    exists: bool


@dataclass(slots=True, eq=False)
class Execution:
    """The execution of an attempt, as its agent saw it.

    `cancelled_at` is in virtual seconds. `has_ended`: the agent returned, or its node crashed.
    `host` is the id of its node among those that share the store.
    The rest is for workers: whether the node knows that the worker has the turn, since when the
    worker has no connection, its longest time without one, whether it gave the turn back, and
    whether it learned, back from such a time, that another one may have the turn.
    """

    session_id: str
    run_id: str
    attempt: int
    node: int
    entered: int
    said: list[str] = field(default_factory=list)
    cancelled_at: float | None = None
    has_ended: bool = False
    agent: str = ""
    host: str = ""
    has_begun: bool = True
    away_since: float | None = None
    longest_away: float = 0.0
    is_given_up: bool = False
    is_fenced: bool = False


@dataclass(slots=True, eq=False)
class Watch:
    """A subscription across nodes: its start and its events. `lost`: ranges that were compacted."""

    name: str
    wanted: EventFilter
    start: Position | None = None
    cursor: Position = 0
    came: list[LoggedComplete] = field(default_factory=list)
    lost: list[tuple[Position, Position]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Follow:
    """A follower of a run, across nodes. `cut`: the events of the run were removed meanwhile."""

    run_id: str
    after: int
    came: list[RunEvent] = field(default_factory=list)
    ended: bool = False
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the trace."""

    at: float
    step: int
    actor: str
    what: str

    def __str__(self) -> str:
        return f"{self.at:10.4f} s  step {self.step:5d}  {self.actor:<12} {self.what}"


class History:
    """Everything that was observed in a world."""

    def __init__(self, loop: SimLoop) -> None:
        self.trace: list[Line] = []
        self.accepts: list[AcceptOp] = []
        self.cancels: list[CancelOp] = []
        self.updates: list[UpdateOp] = []
        self.forks: list[ForkOp] = []
        self.fleeting: list[SessionChange] = []
        self.executions: list[Execution] = []
        self.watches: list[Watch] = []
        self.follows: list[Follow] = []
        self.completes: list[tuple[int, LoggedComplete]] = []
        self.events: dict[RunKey, list[tuple[int, RunEvent]]] = {}
        self.ended_when: dict[str, float] = {}
        self.lost_hosts: set[str] = set()
        self.paused_nodes: set[int] = set()
        self.downs: list[int] = []
        self.crashes = 0
        self.stops = 0
        self.pauses: list[tuple[int, int]] = []
        self.stales = 0
        self.lost_links = 0
        self.returns = 0
        self._loop = loop
        self._tick = 0

    @property
    def now(self) -> float:
        """The virtual time."""
        return self._loop.time()

    def lasting(self) -> list[AcceptOp]:
        """The accepts that were answered, in sessions that are never deleted."""
        return [op for op in self.accepts if op.outcome == OK and op.session_id not in FLEETING]

    def deletions(self, session_id: str) -> list[int]:
        """The ticks at which a session was deleted."""
        return [it.tick for it in self.fleeting if it.session_id == session_id and not it.exists]

    def existed(self, session_id: str, since: int) -> bool:
        """Whether a session that comes and goes existed at any time since a tick."""
        changes = [it for it in self.fleeting if it.session_id == session_id]
        before = [it.exists for it in changes if it.tick <= since]
        return before[-1:] == [True] or any(it.exists for it in changes if it.tick > since)

    def has_ended(self, run_id: str) -> bool:
        """Whether the end of a run is durable."""
        return any(logged.complete.run_id == run_id for _, logged in self.completes)

    @property
    def losses(self) -> int:
        """The number of times that a node lost its runs."""
        return self.crashes + self.stops + len(self.pauses)

    def tick(self) -> int:
        """Advances and returns the number that orders all events."""
        self._tick += 1
        return self._tick

    def note(self, actor: str, what: str) -> int:
        """Adds a line to the trace; returns its tick."""
        self.trace.append(Line(self._loop.time(), self._loop.steps, actor, what))
        return self.tick()

    def broken(self, rule: str) -> None:
        """Records a broken rule, which ends the world."""
        self.note("checker", f"BROKEN: {rule}")
        if self._loop.failure is None:
            self._loop.failure = Broken(rule)

    def require(self, holds: object, rule: str) -> None:
        """Ends the world if a rule does not hold."""
        if not holds:
            self.broken(rule)

    def digest(self) -> str:
        """A hash of the trace; its step numbers make it depend on everything that was scheduled."""
        digest = hashlib.blake2b(digest_size=16)
        for line in self.trace:
            digest.update(f"{line.at!r} {line.step} {line.actor} {line.what}\n".encode())
        return digest.hexdigest()
