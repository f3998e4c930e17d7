"""The commands of a lane as data, so that they can be listed, counted and replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import ModuleType
from typing import Any

from runlane_server.core import lane as lane_rules
from runlane_server.core.agents import DEFAULT_AGENT, AgentNames
from runlane_server.core.errors import (
    ActiveRunChanged,
    AgentNotFound,
    AlreadyStarted,
    AnchorNotWaiting,
    EditConflict,
    IllegalCommand,
    InputClosed,
    QueueFull,
    SessionBusy,
    SessionNotFound,
)
from runlane_server.core.input import (
    Answer,
    InputKind,
    InputRequest,
    InputState,
    OpenInput,
    Park,
    Question,
)
from runlane_server.core.model import (
    CancelScope,
    FinishReason,
    Prompt,
    Role,
    RunError,
    RunRequest,
    RunState,
    SessionKey,
    Text,
    TextDelta,
    ToolCall,
    Usage,
    WhenBusy,
)
from runlane_server.core.retry import RetryPolicy
from runlane_server.core.transition import Lane, LaneRun, Outcome, Reservation, Transition
from runlane_server.core.turn import DraftMessage
from runlane_server.core.update import Move, Place, RunContent, RunUpdate

KEY = SessionKey("default", "s")
EMPTY = Lane(KEY)
AT = 1_000
BOOM = RunError("BOOM", "it went wrong")
FATAL = RunError("FATAL", "it cannot go right")
POLICY = RetryPolicy(("BOOM",), max_attempts=2, initial_backoff=10, after_output=True)
LATER = AT + 10
"""When a run whose agent failed may start again."""
ANSWER = Answer("a", '"yes"', "somebody", "token", "", "", AT)
OTHER = "other"
"""An agent besides the default one."""
NOBODY = "nobody"
"""An agent that is not declared."""
AGENTS = AgentNames((DEFAULT_AGENT, OTHER), DEFAULT_AGENT)
ELSEWHERE = "b"
"""A node that adopts runs. They are started on the node without a name."""

STREAMED = 1
"""Number of events that each attempt is assumed to have streamed before it is drained or ends."""


class Verb(StrEnum):
    """The functions of `core.lane`."""

    RESERVE = "reserve"
    RELEASE = "release"
    ACCEPT = "accept"
    DISPATCH = "dispatch"
    CANCEL = "cancel"
    DRAIN = "drain"
    ASK = "ask"
    ANSWER = "answer"
    EXPIRE = "expire"
    RESUME = "resume"
    FINISH = "finish"
    NODE_LOST = "node_lost"
    HAND_OVER = "hand_over"
    HAND_BACK = "hand_back"
    ADOPT = "adopt"
    UPDATE = "update"
    FAIL_WAITING = "fail_waiting"
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class Command:
    """A command with all that it takes. `max_attempts` and `retry` are those of the run accepted,
    `agent` the one that it names, or the one whose waiting runs fail; `error` is why a finish
    fails, and `at` is the time of a dispatch; `host` is the node of the active run's supervisor, or
    the one that starts, resumes or adopts it; `lost_with` is the node with which it was lost;
    `expected` is the active run that an accept expects; `key` is that of the question asked or
    answered; an agent that parks to `restart` leaves no checkpoint. An update changes the prompt if
    it `edits`, `sends` the run in another way, and moves it to a `place`, if the run is at
    `revision`; `repeated`: it is the last update of the run again."""

    verb: Verb
    token: str = ""
    run_id: str = ""
    when_busy: WhenBusy = WhenBusy.QUEUE
    scope: CancelScope = CancelScope.SESSION
    attempt: int = 0
    ok: bool = True
    allow_missing: bool = True
    max_waiting: int = 9
    max_attempts: int = 2
    at: int = AT
    retry: RetryPolicy | None = None
    error: RunError = BOOM
    agent: str = ""
    host: str | None = None
    lost_with: str | None = None
    expected: str = ""
    key: str = ""
    has_default: bool = False
    resumable: bool = False
    park: bool = False
    restart: bool = False
    repeated: bool = False
    edits: bool = False
    sends: WhenBusy | None = None
    place: Place | None = None
    anchor: str = ""
    revision: int | None = None

    def __str__(self) -> str:
        node = () if self.host is None else (f"on {self.host!r}",)
        lost = () if self.lost_with is None else (f"lost with {self.lost_with!r}",)
        arguments: dict[Verb, tuple[str, ...]] = {
            Verb.RESERVE: (self.token, self.run_id),
            Verb.RELEASE: (self.token,),
            Verb.ACCEPT: (
                *(self.token, self.run_id, self.when_busy, self.agent),
                f"while {self.expected}" * bool(self.expected),
            ),
            Verb.FAIL_WAITING: (self.agent,),
            Verb.CANCEL: (self.scope, self.run_id),
            Verb.DRAIN: (self.run_id, str(self.attempt), *node),
            Verb.FINISH: (
                self.run_id,
                str(self.attempt),
                "ok" if self.ok else self.error.reason,
                *node,
            ),
            Verb.DISPATCH: ("later" * (self.at > AT), *node),
            Verb.RESUME: node,
            Verb.NODE_LOST: lost,
            Verb.HAND_OVER: (self.run_id, str(self.attempt), *node),
            Verb.HAND_BACK: (self.run_id, str(self.attempt), *node),
            Verb.ADOPT: (self.run_id, str(self.attempt), *node, *lost),
            Verb.ASK: (
                *(self.run_id, str(self.attempt), self.key, "default" * self.has_default),
                *("resumable" * self.resumable, "park" * self.park, "restart" * self.restart),
                "repeated" * self.repeated,
            ),
            Verb.UPDATE: (
                *(self.run_id, "edit" * self.edits, self.sends or "", self.place or ""),
                *(self.anchor, "" if self.revision is None else f"at {self.revision}"),
                "repeated" * self.repeated,
            ),
            Verb.ANSWER: (self.run_id, self.key),
            Verb.EXPIRE: (self.run_id, self.key),
        }
        return " ".join((self.verb, *filter(None, arguments.get(self.verb, ()))))

    def apply(self, lane: Lane, rules: ModuleType = lane_rules) -> Transition[Any]:
        """Applies the command with the rules, or with a mutant of them."""
        made = _CALLS[self.verb](rules, lane, self)
        assert isinstance(made, Transition)
        return made

    @property
    def request(self) -> RunRequest:
        """The request of an accept."""
        return RunRequest(
            self.run_id,
            Prompt("do it"),
            self.when_busy,
            max_attempts=self.max_attempts,
            retry=self.retry,
            agent=self.agent,
            expected_active=self.expected,
        )

    def outcome(self, lane: Lane) -> Outcome:
        """How the agent's turn ended."""
        return Outcome(
            FinishReason.STOP if self.ok else FinishReason.ERROR,
            None if self.ok else self.error,
            spoken(lane),
            (TextDelta("!"),),
            Usage(requests=1),
            "model",
        )

    def refusal(self, lane: Lane) -> type[Exception] | None:  # noqa: PLR0911 - one per verb
        """The error that the command must raise; None if it is legal."""
        match self.verb:
            case Verb.RESERVE:
                return IllegalCommand if self._held(lane) else None
            case Verb.ACCEPT:
                return self._accept_refusal(lane)
            case Verb.ANSWER:
                return None if self.input_of(lane) else InputClosed
            case Verb.DRAIN | Verb.FINISH | Verb.HAND_OVER | Verb.HAND_BACK:
                here = self.host is None or (lane.active and lane.active.host == self.host)
                here = here or (self.verb is not Verb.DRAIN and ends_without_node(lane.active))
                return None if here and self._is_of_active(lane) else IllegalCommand
            case Verb.UPDATE:
                return self._update_refusal(lane)
            case Verb.ADOPT | Verb.ASK:
                return None if self._is_of_active(lane) else IllegalCommand
            case Verb.REMOVE:
                idle = not (lane.active or lane.waiting or lane.reservations)
                if not lane.version:
                    return SessionNotFound
                return None if idle else SessionBusy
            case _:
                return None

    def is_late(self, lane: Lane) -> bool:
        """Whether the active run is not on the node any more with which it was lost."""
        active = lane.active
        return active is not None and self.lost_with not in {None, active.host}

    def _is_of_active(self, lane: Lane) -> bool:
        active = lane.active
        at_work = active is not None and (active.run_id, active.attempt)
        return at_work == (self.run_id, self.attempt)

    def _accept_refusal(  # noqa: PLR0911 - one per error, in their order
        self, lane: Lane
    ) -> type[Exception] | None:
        held = self._held(lane)
        if held is None:
            return IllegalCommand
        if self.run_id in live_ids(lane):
            return None
        if not (lane.version or self.allow_missing):
            return SessionNotFound
        if self.agent == NOBODY:
            return AgentNotFound
        if self.expected and self.expected != at_work(lane):
            return ActiveRunChanged
        behind = lane.active is not None or lane.waiting != ()
        before = lane.reservations[: lane.reservations.index(held)]
        beaten = any(other.run_id != self.run_id for other in before)
        if self.when_busy is WhenBusy.REJECT and (behind or beaten):
            return SessionBusy
        return QueueFull if behind and len(lane.waiting) >= self.max_waiting else None

    def is_known_update(self, lane: Lane) -> bool:
        """Whether the run has this update already, and does not wait to be moved again."""
        run = next((run for run in live(lane) if run.run_id == self.run_id), None)
        if run is None or not run.last_update or not self.repeated:
            return False
        return bool(run.turn) if self.revision is None else run.revision == self.revision + 1

    def _update_refusal(self, lane: Lane) -> type[Exception] | None:
        if self.is_known_update(lane):
            return None
        waiting = [run for run in lane.waiting if not run.turn]
        run = next((run for run in waiting if run.run_id == self.run_id), None)
        if run is None:
            return AlreadyStarted
        if self.revision is not None and self.revision != run.revision:
            return EditConflict
        if self.place not in {Place.BEFORE, Place.AFTER}:
            return None
        others = [other.run_id for other in lane.waiting if other is not run]
        if self.anchor not in others:
            return AnchorNotWaiting
        behind = {other.run_id for other in lane.waiting if other.turn}
        overtakes = behind & set(others[others.index(self.anchor) :])
        return AnchorNotWaiting if self.place is Place.BEFORE and overtakes else None

    def update_of(self, lane: Lane) -> RunUpdate:
        """The update of a run."""
        run = next((run for run in live(lane) if run.run_id == self.run_id), None)
        new = "" if self.repeated or run is None else f"update {run.revision + 1}"
        return RunUpdate(
            self.run_id,
            new or (run.last_update if run is not None else "") or "never",
            "excerpt",
            content=RunContent(Prompt("do that"), {}) if self.edits else None,
            when_busy=self.sends,
            move=None if self.place is None else Move(self.place, self.anchor),
            revision=self.revision,
            growth=int(self.edits),
        )

    def input_of(self, lane: Lane) -> OpenInput | None:
        """The open request that the command names."""
        held = (
            one for run in live(lane) if run.run_id == self.run_id for one in run.asking.pending
        )
        return next((one for one in held if one.key == self.key), None)

    def input_id_of(self, lane: Lane) -> str:
        """Its id."""
        found = self.input_of(lane)
        return "unknown" if found is None else found.input_request_id

    def asks(self, lane: Lane) -> int:
        """The number of asks of the active run so far."""
        return lane.active.asking.asks if lane.active else 0

    def asked(self, lane: Lane) -> InputRequest:
        """The request of an ask."""
        count = lane.active.asking.asked if lane.active else 0
        default = '"yes"' if self.has_default else None
        question = Question(self.key, InputKind.TEXT, "well?", default_json=default)
        return InputRequest(
            f"{self.run_id}-{self.key}-{count}",
            KEY.session_id,
            self.run_id,
            question,
            InputState.OPEN,
            AT,
            None,
        )

    def _held(self, lane: Lane) -> Reservation | None:
        return next((held for held in lane.reservations if held.token == self.token), None)


_CALLS: Mapping[Verb, Callable[[ModuleType, Lane, Command], object]] = {
    Verb.RESERVE: lambda rules, lane, self: rules.reserve(lane, self.token, self.run_id),
    Verb.RELEASE: lambda rules, lane, self: rules.release(lane, self.token),
    Verb.ACCEPT: lambda rules, lane, self: rules.accept(
        lane,
        self.request,
        at=AT,
        token=self.token,
        max_waiting=self.max_waiting,
        allow_missing=self.allow_missing,
        agents=AGENTS,
    ),
    Verb.DISPATCH: lambda rules, lane, self: rules.dispatch(lane, at=self.at, host=self.host or ""),
    Verb.CANCEL: lambda rules, lane, self: rules.cancel(
        lane, self.scope, at=AT, run_id=self.run_id, reason="why not"
    ),
    Verb.DRAIN: lambda rules, lane, self: rules.drain_for_step(
        lane, self.run_id, self.attempt, at=AT, events=streamed(lane), host=self.host
    ),
    Verb.ASK: lambda rules, lane, self: rules.ask(
        lane,
        self.run_id,
        self.attempt,
        (self.asked(lane),),
        at=AT,
        events=streamed(lane),
        number=self.asks(lane) + (not self.repeated),
        resumable=self.resumable,
        park=Park("" if self.restart else "state", 1) if self.park else None,
        content=spoken(lane) if self.park else (),
    ),
    Verb.ANSWER: lambda rules, lane, self: rules.answer(
        lane, self.run_id, self.input_id_of(lane), ANSWER, at=AT
    ),
    Verb.EXPIRE: lambda rules, lane, self: rules.expire(
        lane, self.run_id, self.input_id_of(lane), at=AT
    ),
    Verb.RESUME: lambda rules, lane, self: rules.resume(lane, at=AT, host=self.host or ""),
    Verb.FINISH: lambda rules, lane, self: rules.finish(
        lane,
        self.run_id,
        self.attempt,
        self.outcome(lane),
        at=AT,
        events=streamed(lane),
        host=self.host,
    ),
    Verb.NODE_LOST: lambda rules, lane, self: rules.node_lost(
        lane,
        *_of_active(lane),
        at=AT,
        content=spoken(lane),
        events=streamed(lane),
        lost_with=self.lost_with,
    ),
    Verb.HAND_OVER: lambda rules, lane, self: rules.hand_over(
        lane,
        self.run_id,
        self.attempt,
        self.outcome(lane),
        at=AT,
        events=streamed(lane),
        host=self.host,
    ),
    Verb.HAND_BACK: lambda rules, lane, self: rules.hand_over(
        lane,
        self.run_id,
        self.attempt,
        _unused(lane),
        at=AT,
        events=streamed(lane),
        is_unused=True,
        host=self.host,
    ),
    Verb.ADOPT: lambda rules, lane, self: rules.adopt(
        lane, self.run_id, self.attempt, host=self.host or "", lost_with=self.lost_with
    ),
    Verb.UPDATE: lambda rules, lane, self: rules.update(lane, self.update_of(lane), at=AT),
    Verb.FAIL_WAITING: lambda rules, lane, self: rules.fail_waiting(
        lane, BOOM, at=AT, agents={self.agent} if self.agent else None
    ),
    Verb.REMOVE: lambda rules, lane, self: rules.remove(lane),
}


def at_work(lane: Lane) -> str | None:
    """The run that a prompt of now would interrupt."""
    if lane.active is not None:
        return lane.active.run_id
    head = lane.waiting[0] if lane.waiting else None
    return head.run_id if head is not None and head.not_before else None


def _unused(lane: Lane) -> Outcome:
    """The outcome of an executor that has emitted nothing; what it folded in is there."""
    return Outcome(FinishReason.STOP, content=spoken(lane) if lane.folded else ())


def _of_active(lane: Lane) -> tuple[str, int]:
    return (lane.active.run_id, lane.active.attempt) if lane.active else ("nobody", 1)


def streamed(lane: Lane) -> int:
    """The number of events of the active run, with those streamed since the last commit. While it
    waits for input, its agent streams nothing."""
    if lane.active is None:
        return 0
    waits = lane.active.state is RunState.INPUT_REQUIRED
    return lane.active.events + (0 if waits else STREAMED)


def spoken(lane: Lane) -> tuple[DraftMessage, ...]:
    """The output of the agent: a text, and after each folded prompt a call that is still open."""
    said = [DraftMessage(Role.ASSISTANT, (Text("so far"),))]
    for run in lane.folded:
        said.append(DraftMessage(Role.USER, run_id=run.run_id))
        said.append(DraftMessage(Role.ASSISTANT, (ToolCall(run.run_id, "look", "{}"),)))
    return tuple(said)


def live(lane: Lane) -> tuple[LaneRun, ...]:
    """The runs of a lane, wherever they are in it."""
    active = () if lane.active is None else (lane.active,)
    return (*active, *lane.folded, *lane.waiting)


def live_ids(lane: Lane) -> set[str]:
    """The ids of the runs of a lane."""
    return {run.run_id for run in live(lane)}


# --- Short forms --------------------------------------------------------------------------------


def reserve(token: str, run_id: str = "") -> Command:
    """A reservation; token and run id are the same unless given."""
    return Command(Verb.RESERVE, token=token, run_id=run_id or token)


def accept(
    run_id: str, when_busy: WhenBusy = WhenBusy.QUEUE, *, token: str = "", agent: str = ""
) -> Command:
    """An accept of a run with the reservation of the same name."""
    return Command(
        Verb.ACCEPT, token=token or run_id, run_id=run_id, when_busy=when_busy, agent=agent
    )


def cancel(scope: CancelScope = CancelScope.SESSION, run_id: str = "") -> Command:
    """A cancel."""
    return Command(Verb.CANCEL, scope=scope, run_id=run_id)


def drain(run_id: str, attempt: int = 1) -> Command:
    """A step of the active run."""
    return Command(Verb.DRAIN, run_id=run_id, attempt=attempt)


def finish(run_id: str, attempt: int = 1, *, ok: bool = True, error: RunError = BOOM) -> Command:
    """The end of the active run."""
    return Command(Verb.FINISH, run_id=run_id, attempt=attempt, ok=ok, error=error)


def ask(
    run_id: str,
    attempt: int = 1,
    key: str = "k",
    *,
    has_default: bool = False,
    resumable: bool = False,
    park: bool = False,
    restart: bool = False,
    repeated: bool = False,
) -> Command:
    """A question of the active run; `repeated`: its supervisor asks it again, as it does not know
    that the last ask of the run was committed."""
    return Command(
        Verb.ASK,
        run_id=run_id,
        attempt=attempt,
        key=key,
        has_default=has_default,
        resumable=resumable,
        park=park or restart,
        restart=restart,
        repeated=repeated,
    )


def answer(run_id: str, key: str = "k") -> Command:
    """An answer to an open request."""
    return Command(Verb.ANSWER, run_id=run_id, key=key)


def expire(run_id: str, key: str = "k") -> Command:
    """The expiry of an open request."""
    return Command(Verb.EXPIRE, run_id=run_id, key=key)


def hand_over(run_id: str, attempt: int = 1) -> Command:
    """The node of the active run hands it over."""
    return Command(Verb.HAND_OVER, run_id=run_id, attempt=attempt)


def hand_back(run_id: str, attempt: int = 1) -> Command:
    """The executor of the active run gives it back, without output of its own."""
    return Command(Verb.HAND_BACK, run_id=run_id, attempt=attempt)


def adopt(
    run_id: str, attempt: int = 1, *, host: str = ELSEWHERE, lost_with: str | None = None
) -> Command:
    """A node adopts the active run, if it was lost with a node: if it is still there."""
    return Command(Verb.ADOPT, run_id=run_id, attempt=attempt, host=host, lost_with=lost_with)


def node_lost(lost_with: str) -> Command:
    """A node is lost, and with it the active run, if it is still there."""
    return Command(Verb.NODE_LOST, lost_with=lost_with)


def update(
    run_id: str,
    *,
    edits: bool = False,
    sends: WhenBusy | None = None,
    place: Place | None = None,
    anchor: str = "",
    revision: int | None = None,
    repeated: bool = False,
) -> Command:
    """An update of a run that may wait."""
    return Command(
        Verb.UPDATE,
        run_id=run_id,
        edits=edits,
        sends=sends,
        place=place,
        anchor=anchor,
        revision=revision,
        repeated=repeated,
    )


DISPATCH = Command(Verb.DISPATCH)
DISPATCH_LATER = Command(Verb.DISPATCH, at=LATER)
DISPATCH_ELSEWHERE = Command(Verb.DISPATCH, host=ELSEWHERE)
NODE_LOST = Command(Verb.NODE_LOST)
RESUME = Command(Verb.RESUME)
RESUME_ELSEWHERE = Command(Verb.RESUME, host=ELSEWHERE)
FAIL_WAITING = Command(Verb.FAIL_WAITING)
FAIL_OTHER = Command(Verb.FAIL_WAITING, agent=OTHER)
REMOVE = Command(Verb.REMOVE)


def stored(lane: Lane, made: Transition) -> Lane:
    """The lane once a transition is committed."""
    if not made.needs_commit or made.removed:
        return made.lane
    return Lane(
        made.lane.key,
        lane.version + 1,
        made.lane.accept_seq,
        made.lane.turn,
        made.lane.active,
        made.lane.folded,
        made.lane.waiting,
        made.lane.reservations,
        made.lane.agent,
    )


def is_cancelling(run: LaneRun | None) -> bool:
    """Whether a run is active and covered by a cancel."""
    return run is not None and run.state is RunState.CANCELLING


def ends_without_node(run: LaneRun | None) -> bool:
    """Whether a run is about to end that its agent has left: its supervisor may end it."""
    ends = is_cancelling(run) or (run is not None and bool(run.asking.expired))
    return run is not None and run.asking.parked and ends


def is_parked(run: LaneRun | None) -> bool:
    """Whether a run waits for input, and no agent works for it."""
    return run is not None and run.state is RunState.INPUT_REQUIRED and run.asking.parked
