"""The rules of a lane: which run of a session is active, which wait, and what commands change.

How to think about this machine
-------------------------------
A session is a conversation, and its prompts run one at a time. The **lane** is everything needed to
keep that promise: the active run, the runs folded into its turn, the waiting runs in order, and the
reservations of accepts that have begun. It is one frozen record of one version. Prompts, messages
and events are not in it; they are in the store.

    reservations --accept--> waiting --dispatch--> active --finish--> (gone)
                                |                    ^
                                +--drain_for_step----+   folded into the active turn

A **command** is a plain function below: `reserve`, `release`, `accept`, `dispatch`, `cancel`,
`drain_for_step`, `ask`, `answer`, `expire`, `resume`, `finish`, `node_lost`, `hand_over`, `adopt`,
`fail_waiting`, `remove`. It takes a lane, its arguments and the time, and either raises and changes
nothing or returns a **transition**: the next lane and everything to be committed with it - changed
runs, messages, events - plus the reply to the caller. The store commits a transition as one
transaction, on condition that the lane still has the version that the command saw. If it has not,
the command is simply applied again to the new lane. That is the only concurrency control, so no
race is decided anywhere but here: of a cancel and a completion the one that is committed first
wins, and the other sees its result (R8, R19).

A **trigger** moves one run from state to state, as `TABLE` lists; every pair that is not in the
table is illegal. The table knows nothing about other runs. The commands decide *which* runs a
trigger applies to: a cancel triggers CANCEL for every run it covers, a handoff triggers ADVANCE for
the next run.

A run that waits is ACCEPTED at the head of a lane without an active run, and QUEUED otherwise. That
is a property of its place, so no command sets it: `_Edit.done` derives it at the end.

A run whose agent failed, and whose retry policy asks for another attempt, goes back to the head and
waits there until its backoff is over (R38). It is ACCEPTED, as no agent is at work for it and it
holds no slot; but it has begun its turn, so a cancel of the active run covers it, INTERRUPT cancels
it, and a cancel of the waiting runs spares it.

A cancelled active run stays in its place as CANCELLING until its agent has returned (R9), so the
lane is busy for that long. A run that ends without having been active still gets its turn in the
transcript (R14).

A run whose agent asks people stays the active run, as INPUT_REQUIRED, and needs no slot (R40). It
is INPUT_REQUIRED also while it has all answers and waits for a slot; `resume` makes it ACTIVE. A
request belongs to the run, not to the attempt: it stays open, and keeps its answer, when an attempt
is lost (R44). The end of the run, or a cancel, withdraws open requests (R42).

How to add a rule
-----------------
A new state or trigger goes into `RunState` or `Trigger` and into `TABLE`. A new ordering or a new
way to cover runs goes into a method of `_Edit`, which the commands combine; a new command is a
function that makes an `_Edit`, calls it, and returns `edit.done(reply)`. Then extend the exhaustive
search: `tests/proofs/lanecheck` has the commands, their effects written down a second time, and the
invariants. Nothing here may await, read a clock or generate an id.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from enum import StrEnum
from itertools import takewhile
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

from runlane_server.core.agents import ONE_AGENT, AgentNames
from runlane_server.core.errors import (
    IllegalCommand,
    InputClosed,
    InputLimit,
    QueueFull,
    SessionBusy,
    SessionNotFound,
)
from runlane_server.core.input import (
    MAX_INPUTS,
    MAX_OPEN_INPUTS,
    NO_INPUT,
    Answer,
    InputChange,
    InputRequest,
    InputState,
    LateInput,
    OpenInput,
    Park,
)
from runlane_server.core.model import (
    MAX_COMPLETE_TEXT_BYTES,
    NO_USAGE,
    Accepted,
    CancelScope,
    EventBody,
    FinishReason,
    Folded,
    InputAnswered,
    InputExpired,
    InputRequested,
    InputWithdrawn,
    Message,
    Micros,
    Resumed,
    Role,
    RunComplete,
    RunError,
    RunEvent,
    RunRequest,
    RunState,
    Started,
    Usage,
    WhenBusy,
    cut_utf8,
)
from runlane_server.core.transition import (
    CoveredRun,
    Lane,
    LaneRun,
    Outcome,
    Receipt,
    Reservation,
    RunChange,
    Transition,
)
from runlane_server.core.turn import DraftMessage, close, final_text, with_result

Reply = TypeVar("Reply")

ClosedInput: TypeAlias = InputAnswered | InputWithdrawn | InputExpired


class Trigger(StrEnum):
    """Moves one run from state to state."""

    ENTER = "enter"  # it is accepted as the first run of its lane
    WAIT = "wait"  # another run is active or comes before it
    ADVANCE = "advance"  # it becomes first in its lane
    START = "start"  # its agent is started
    FOLD = "fold"  # it joins the active turn
    CANCEL = "cancel"  # a cancel covers it, or the run whose turn it joined
    WITHDRAW = "withdraw"  # a cancel covers it alone; the turn it joined continues
    COMPLETE = "complete"  # its turn completes
    FAIL = "fail"  # its turn fails, or it cannot start
    RETRY = "retry"  # its node was lost or stops, or its agent failed, and it has an attempt left
    ASK = "ask"  # its agent asks people, and it releases its slot
    RESUME = "resume"  # all its questions are answered, and it has a slot again


_S, _H = RunState, Trigger

TABLE: Mapping[tuple[RunState | None, Trigger], RunState] = MappingProxyType(
    {
        (None, _H.ENTER): _S.ACCEPTED,
        (None, _H.WAIT): _S.QUEUED,
        (_S.ACCEPTED, _H.WAIT): _S.QUEUED,
        (_S.ACCEPTED, _H.START): _S.ACTIVE,
        (_S.ACCEPTED, _H.CANCEL): _S.CANCELLED,
        (_S.ACCEPTED, _H.FAIL): _S.FAILED,
        (_S.QUEUED, _H.ADVANCE): _S.ACCEPTED,
        (_S.QUEUED, _H.FOLD): _S.FOLDED,
        (_S.QUEUED, _H.CANCEL): _S.CANCELLED,
        (_S.QUEUED, _H.FAIL): _S.FAILED,
        (_S.ACTIVE, _H.CANCEL): _S.CANCELLING,
        (_S.ACTIVE, _H.COMPLETE): _S.COMPLETED,
        (_S.ACTIVE, _H.FAIL): _S.FAILED,
        (_S.ACTIVE, _H.RETRY): _S.ACCEPTED,
        (_S.ACTIVE, _H.ASK): _S.INPUT_REQUIRED,
        (_S.INPUT_REQUIRED, _H.RESUME): _S.ACTIVE,
        (_S.INPUT_REQUIRED, _H.CANCEL): _S.CANCELLING,
        (_S.INPUT_REQUIRED, _H.COMPLETE): _S.COMPLETED,
        (_S.INPUT_REQUIRED, _H.FAIL): _S.FAILED,
        (_S.INPUT_REQUIRED, _H.RETRY): _S.ACCEPTED,
        (_S.FOLDED, _H.CANCEL): _S.CANCELLING,
        (_S.FOLDED, _H.WITHDRAW): _S.CANCELLED,
        (_S.FOLDED, _H.COMPLETE): _S.COMPLETED,
        (_S.FOLDED, _H.FAIL): _S.FAILED,
        (_S.FOLDED, _H.RETRY): _S.QUEUED,
        # A confirmed cancel stays in force, however the turn ends (R19).
        (_S.CANCELLING, _H.COMPLETE): _S.CANCELLED,
        (_S.CANCELLING, _H.FAIL): _S.CANCELLED,
    }
)
"""The next state of a run for each legal pair of state and trigger. None: not in its lane yet."""


NODE_LOST = "the node that ran it was lost"
SHUT_DOWN = "the node that ran it was shut down"
"""Messages of runs that end INTERRUPTED."""

INPUT_EXPIRED = "INPUT_EXPIRED"
"""Reason of a run that failed because nobody answered in time."""

_ASKING = frozenset({RunState.ACTIVE, RunState.INPUT_REQUIRED})
"""States in which no cancel covers the active run."""

ATTEMPT_ORDINALS = 1 << 20
"""Number of message ordinals reserved for each attempt: more than any attempt writes."""


# --- Accept -------------------------------------------------------------------------------------


def reserve(lane: Lane, token: str, run_id: str) -> Transition[None]:
    """Begins an accept: the session is busy from now on, and a cancel covers it (R6, R8, R10).

    If a receipt already lists the run id, for another accept of it, the new one is covered too.
    """
    if any(reservation.token == token for reservation in lane.reservations):
        raise IllegalCommand(f"reservation {token} exists already")
    same_run = (held for held in lane.reservations if held.run_id == run_id)
    covered = next((held for held in same_run if held.covered), None)
    reservation = covered._replace(token=token) if covered else Reservation(token, run_id)
    return Transition(lane._replace(reservations=(*lane.reservations, reservation)))


def release(lane: Lane, token: str) -> Transition[None]:
    """Ends a reservation; does nothing if it has ended already (R6)."""
    left = tuple(held for held in lane.reservations if held.token != token)
    return Transition(lane._replace(reservations=left))


def accept(
    lane: Lane,
    request: RunRequest,
    *,
    at: Micros,
    token: str,
    max_waiting: int,
    allow_missing: bool = False,
    agents: AgentNames = ONE_AGENT,
) -> Transition[LaneRun]:
    """Turns a reservation into a run. Replies with it, or with the run that already has this id.

    Raises SessionNotFound (R2), AgentNotFound and PermissionDenied (R31), SessionBusy (REJECT,
    R27), QueueFull, and IllegalCommand if the reservation does not exist.
    """
    held = next((held for held in lane.reservations if held.token == token), None)
    if held is None:
        raise IllegalCommand(f"there is no reservation {token}")
    edit = _Edit(lane, at)
    edit.release(token)
    known = lane.find(request.run_id)
    if known is not None:
        return edit.done(reply=known)
    if not (lane.exists or allow_missing):
        raise SessionNotFound.of(lane.key.session_id)
    agent = agents.choose(request.agent, lane.agent)
    _check_room(lane, held, request, max_waiting=max_waiting)
    if request.when_busy is WhenBusy.INTERRUPT and not held.covered:
        edit.cancel_active("interrupted by " + request.run_id)
    run = edit.enter(request, agent)
    if held.covered:
        edit.cancel_waiting([run], held.cancel_reason)
    return edit.done(reply=edit.current(run))


def _check_room(lane: Lane, held: Reservation, request: RunRequest, *, max_waiting: int) -> None:
    behind_another = lane.active is not None or bool(lane.waiting)
    # Only earlier reservations count: of a burst of accepts with REJECT, one is accepted.
    earlier = takewhile(lambda other: other.token != held.token, lane.reservations)
    beaten = any(other.run_id != held.run_id for other in earlier)
    if request.when_busy is WhenBusy.REJECT and (behind_another or beaten):
        raise SessionBusy(f"session {lane.key.session_id!r} has work")
    if behind_another and len(lane.waiting) >= max_waiting:
        raise QueueFull(
            f"session {lane.key.session_id!r} is at its limit of {max_waiting} waiting runs"
        )


def dispatch(lane: Lane, *, at: Micros, host: str = "") -> Transition[LaneRun | None]:
    """Starts the first waiting run on node `host` if no run is active (R7, R8).

    Replies with the run, or None if there is nothing to start: a run that waits for its next
    attempt keeps its place, and nothing overtakes it (R38).
    """
    edit = _Edit(lane, at)
    return edit.done(reply=edit.start(host) if lane.can_start_at(at) else None)


# --- Cancel -------------------------------------------------------------------------------------


def cancel(
    lane: Lane, scope: CancelScope, *, at: Micros, run_id: str = "", reason: str = ""
) -> Transition[Receipt]:
    """Covers the accepted runs that have not ended (R10 to R16). Replies with the receipt (R20).

    If there is nothing to cover, nothing changes (R12, R13). `run_id` is for scope RUN; a run that
    is not in the lane has ended and is not covered. A run that waits for its next attempt counts as
    the active one (R38).
    """
    edit = _Edit(lane, at)
    before = {run.run_id: run for run in lane.runs}
    if scope is CancelScope.RUN:
        edit.cancel_run(run_id, reason)
    if scope in {CancelScope.SESSION, CancelScope.ACTIVE}:
        edit.cancel_active(reason)
    if scope in {CancelScope.SESSION, CancelScope.WAITING}:
        edit.cancel_waiting(lane.queue, reason)
    covered = [
        CoveredRun(run_id, before[run_id].accept_seq, before[run_id].state)
        for run_id in edit.covered
    ]
    covered.sort(key=lambda run: run.accept_seq)
    if scope is not CancelScope.ACTIVE:
        only = run_id if scope is CancelScope.RUN else None
        covered += edit.cover_reservations(only, reason, known=before)
    return edit.done(reply=Receipt(lane.key.session_id, tuple(covered), lane.accept_seq))


# --- The active run -----------------------------------------------------------------------------


def drain_for_step(
    lane: Lane, run_id: str, attempt: int, *, at: Micros, events: int, host: str | None = None
) -> Transition[tuple[LaneRun, ...]]:
    """Folds the waiting FOLD runs of its agent into the active turn, in accept order (R26, R27).

    `events` is the number of events of the active run so far. Replies with the folded runs; none
    if the active run was cancelled. Raises IllegalCommand if the attempt is not the active one, or
    not active on node `host`.
    """
    active = _the_active(lane, run_id, attempt, host)
    edit = _Edit(lane, at)
    # Its supervisor counts the folded runs; an event of input would be one more.
    edit.count(active, events, with_late=False)
    folded = edit.fold() if active.state is RunState.ACTIVE else ()
    return edit.done(reply=folded)


def finish(
    lane: Lane,
    run_id: str,
    attempt: int,
    outcome: Outcome,
    *,
    at: Micros,
    events: int,
    cancelled: str | None = None,
    host: str | None = None,
) -> Transition[RunComplete | None]:
    """Ends the active run and those folded into it. Replies with its RunComplete, or with None if
    its retry policy repeats the attempt (R38).

    A run that a cancel covers ends cancelled regardless of the outcome (R19). `cancelled` is the
    reason of the cancel that its agent was stopped for, if that cancel may not be committed yet.
    Raises IllegalCommand if the attempt is not the active one, or not active on node `host`: it was
    fenced off.
    """
    active = _the_active(lane, run_id, attempt, host)
    edit = _Edit(lane, at)
    edit.count(active, events)
    if cancelled is not None:
        edit.cancel_active(cancelled)
    elif (backoff := _backoff(active, outcome)) is not None:
        edit.retry(outcome.content, outcome.tail, failed=True, not_before=at + backoff)
        return edit.done(reply=None)
    return edit.done(reply=edit.end_turn(outcome))


def _backoff(active: LaneRun, outcome: Outcome) -> Micros | None:
    """The time until the next attempt if the policy of the run asks for one."""
    policy, error = active.retry, outcome.error
    if policy is None or error is None or outcome.is_final or active.state is not RunState.ACTIVE:
        return None
    if active.asking.expired:
        return None  # it ends with INPUT_EXPIRED (R43)
    had_output = any(draft.role is not Role.USER for draft in outcome.content)
    return policy.backoff(error.reason, active.failures + 1, had_output=had_output)


def node_lost(
    lane: Lane,
    run_id: str,
    attempt: int,
    *,
    at: Micros,
    content: tuple[DraftMessage, ...],
    events: int,
) -> Transition[bool]:
    """Retries a run whose node was lost, or ends it INTERRUPTED.

    A run that waits for input keeps its attempt if its agent can resume (R44). `content` and
    `events` are the stored messages, and the number of events, of the attempt. A confirmed cancel
    stays in force. Replies with whether the attempt was still active: another node may have
    recovered it already.
    """
    active = lane.active
    if active is None or (active.run_id, active.attempt) != (run_id, attempt):
        return Transition(lane, reply=False)
    return _give_up(lane, active, content, (), at=at, events=events, why=NODE_LOST)


def hand_over(
    lane: Lane,
    run_id: str,
    attempt: int,
    outcome: Outcome,
    *,
    at: Micros,
    events: int,
    why: str = SHUT_DOWN,
    is_unused: bool = False,
    host: str | None = None,
) -> Transition[bool]:
    """Retries a run whose node or worker stops, or ends it INTERRUPTED, as `node_lost` does.

    Of the outcome only the content counts; `why` is the message of the error. `is_unused`: the
    executor gave the run back; without output and folded runs the attempt does not count (R37).
    Raises IllegalCommand if the attempt is not the active one, or not active on node `host`.
    """
    active = _the_active(lane, run_id, attempt, host)
    content, tail = outcome.content, outcome.tail
    is_active = active.state is RunState.ACTIVE
    if is_unused and is_active and not (content or tail or lane.folded):
        edit = _Edit(lane, at)
        edit.count(active._replace(attempt=active.attempt - 1), events)
        edit.retry(())
        return edit.done(reply=True)
    return _give_up(lane, active, content, tail, at=at, events=events, why=why)


def adopt(lane: Lane, run_id: str, attempt: int, *, host: str) -> Transition[LaneRun]:
    """Moves the active run to node `host`, where its executor is connected now (R36).

    The attempt continues, and a confirmed cancel stays in force. A run that waits for input has no
    executor, and stays where it is. Replies with the run. Raises IllegalCommand if the attempt is
    not the active one.
    """
    active = _the_active(lane, run_id, attempt)
    if active.host == host or active.state is RunState.INPUT_REQUIRED:
        return Transition(lane, reply=active)
    moved = active._replace(host=host)
    return Transition(lane._replace(active=moved), (RunChange(moved),), reply=moved)


def _give_up(
    lane: Lane,
    active: LaneRun,
    content: tuple[DraftMessage, ...],
    tail: tuple[EventBody, ...],
    *,
    at: Micros,
    events: int,
    why: str,
) -> Transition[bool]:
    edit = _Edit(lane, at)
    waits = active.state is RunState.INPUT_REQUIRED and not active.asking.expired
    if waits and active.asking.parked:
        return edit.done(reply=False)
    edit.count(active, events)
    if active.asking.restarts and any(draft.run_id for draft in content):
        # Of the runs folded into it, some wait again, and the prompts of the others were written
        # when it parked.
        content, tail = (), ()
    # Attempts that the agent failed are limited by the retry policy.
    counted = active.attempt - active.failures - active.asking.extra_attempts
    if waits and active.asking.resumable:
        edit.park_for_restart(content)
    elif (waits or active.state is RunState.ACTIVE) and counted < active.max_attempts:
        edit.retry(content)
    else:
        error = RunError("INTERRUPTED", why)
        edit.end_turn(Outcome(FinishReason.INTERRUPTED, error, content, tail))
    return edit.done(reply=True)


# --- Input --------------------------------------------------------------------------------------


def ask(
    lane: Lane,
    run_id: str,
    attempt: int,
    requests: tuple[InputRequest, ...],
    *,
    at: Micros,
    events: int,
    resumable: bool = False,
    park: Park | None = None,
    tail: tuple[EventBody, ...] = (),
    content: tuple[DraftMessage, ...] = (),
) -> Transition[tuple[str, ...]]:
    """Asks people, and releases the slot of the run (R40).

    Replies with the id of the request for each question: another one if a request with its key is
    pending or was closed meanwhile, as nobody is asked twice (R44). Replies with nothing if the run
    is about to end: a cancel covers it, or a request has expired. `tail` are the last events of an
    agent that parks, and `content` is its output. Raises InputLimit, and IllegalCommand if the
    attempt is not the active one.
    """
    active = _the_active(lane, run_id, attempt)
    edit = _Edit(lane, at)
    if active.state not in _ASKING or active.asking.expired:
        return edit.done(reply=())
    closed = {key: closed_id for _, closed_id, key in active.asking.late}
    edit.count(active, events)
    names = edit.ask(requests, closed, resumable=resumable, park=park, tail=tail)
    if park is not None and not (park.checkpoint or active.asking.parked):
        edit.park_for_restart(content)
    return edit.done(reply=names)


def answer(
    lane: Lane, run_id: str, input_request_id: str, given: Answer, *, at: Micros
) -> Transition[None]:
    """Answers an open request (R41). Raises InputClosed if it is not open."""
    edit = _Edit(lane, at)
    run, item = _open_input(lane, run_id, input_request_id)
    if run is None or item is None:
        raise InputClosed.of(input_request_id, "it is closed")
    edit.close_input(run, item, InputState.ANSWERED, given)
    return edit.done(reply=None)


def expire(lane: Lane, run_id: str, input_request_id: str, *, at: Micros) -> Transition[bool]:
    """Expires a request: its default answer applies, or the run that waits for it fails (R43).

    Replies with whether it was open.
    """
    edit = _Edit(lane, at)
    run, item = _open_input(lane, run_id, input_request_id)
    if run is None or item is None:
        return edit.done(reply=False)
    edit.expire_input(run, item)
    return edit.done(reply=True)


def resume(lane: Lane, *, at: Micros, host: str = "") -> Transition[LaneRun | None]:
    """Continues the active run, which has all its answers, on node `host` (R41).

    Replies with the run, or None if it cannot continue.
    """
    edit = _Edit(lane, at)
    return edit.done(reply=edit.resume(host) if lane.can_resume else None)


def _open_input(
    lane: Lane, run_id: str, input_request_id: str
) -> tuple[LaneRun | None, OpenInput | None]:
    run = lane.find(run_id)
    held = () if run is None else run.asking.pending
    return run, next((one for one in held if one.input_request_id == input_request_id), None)


def fail_waiting(
    lane: Lane, error: RunError, *, at: Micros, agents: Container[str] | None = None
) -> Transition[int]:
    """Ends the waiting runs as failed before they started (R30): those of the named agents only, if
    there are names (R32). Replies with their number."""
    edit = _Edit(lane, at)
    failed = [run for run in lane.waiting if agents is None or run.agent in agents]
    for run in failed:
        edit.end_unstarted(run, Trigger.FAIL, FinishReason.ERROR, error)
    return edit.done(reply=len(failed))


def remove(lane: Lane, *, unchanged_since: tuple[int, int] | None = None) -> Transition[None]:
    """Removes an idle session.

    With a pair (version, accept_seq), removes it only if it has not changed since. Raises
    SessionNotFound and SessionBusy.
    """
    if not lane.exists:
        raise SessionNotFound.of(lane.key.session_id)
    # A run that is accepted and ends within the same commit changes accept_seq, not the version.
    if unchanged_since not in {None, (lane.version, lane.accept_seq)}:
        raise SessionBusy(f"session {lane.key.session_id!r} is in use again")
    if lane.is_busy:
        raise SessionBusy(f"session {lane.key.session_id!r} has work; cancel it first")
    return Transition(Lane(lane.key), removed=True)


def _the_active(lane: Lane, run_id: str, attempt: int, host: str | None = None) -> LaneRun:
    active = lane.active
    if active is None or (active.run_id, active.attempt) != (run_id, attempt):
        raise IllegalCommand(f"attempt {attempt} of run {run_id} is not active")
    if host not in {None, active.host}:
        raise IllegalCommand(f"attempt {attempt} of run {run_id} continues on another node")
    return active


# --- How a lane is changed ----------------------------------------------------------------------


def advance(run: LaneRun, trigger: Trigger, **changes: Any) -> LaneRun:
    """The run after a trigger. Raises IllegalCommand if `TABLE` has no such entry."""
    return run._replace(state=next_state(run.state, trigger), **changes)


def next_state(state: RunState | None, trigger: Trigger) -> RunState:
    """The state after a trigger; None stands for a run that has not entered its lane."""
    after = TABLE.get((state, trigger))
    if after is None:
        raise IllegalCommand(f"a run that is {state} cannot {trigger}")
    return after


class _Edit:
    """A lane that one command is changing; collects the parts of the transition."""

    def __init__(self, lane: Lane, at: Micros) -> None:
        self.at = at
        self.changes: dict[str, RunChange] = {}
        self.messages: list[Message] = []
        self.events: list[RunEvent] = []
        self.inputs: list[InputChange] = []
        self.covered: list[str] = []
        self._key = lane.key
        self._version = lane.version
        self._accept_seq = lane.accept_seq
        self._turn = lane.turn
        self._active = lane.active
        self._folded = lane.folded
        self._waiting = lane.waiting
        self._reservations = lane.reservations
        self._agent = lane.agent

    def done(self, reply: Reply) -> Transition[Reply]:
        """Builds the transition, after setting the states of the waiting runs."""
        self._set_waiting_states()
        return Transition(
            Lane(
                self._key,
                self._version,
                self._accept_seq,
                self._turn,
                self._active,
                self._folded,
                self._waiting,
                self._reservations,
                self._agent,
            ),
            tuple(self.changes.values()),
            tuple(self.messages),
            tuple(self.events),
            reply,
            inputs=tuple(self.inputs),
        )

    def current(self, run: LaneRun) -> LaneRun:
        """The run as changed so far."""
        self._set_waiting_states()
        return self.changes[run.run_id].run

    def count(self, active: LaneRun, events: int, *, with_late: bool = True) -> None:
        """Sets the number of events of the active run, and writes those that are late.

        While the run waits for input, others write its events; then its lane has the number.
        """
        self._active = active._replace(events=max(active.events, events))
        if with_late and active.asking.late:
            self._active = self._emit_late(self._active)
            self._record(self._active)

    # Entering

    def release(self, token: str) -> None:
        """Ends a reservation."""
        self._reservations = tuple([held for held in self._reservations if held.token != token])

    def enter(self, request: RunRequest, agent: str) -> LaneRun:
        """Adds a new run to the lane: at the end, or at the head with INTERRUPT."""
        waiting = self._waiting
        seq = self._accept_seq + 1
        at_head = request.when_busy is WhenBusy.INTERRUPT
        first = self._active is None and (at_head or not waiting)
        run = LaneRun(
            run_id=request.run_id,
            accept_seq=seq,
            state=next_state(None, Trigger.ENTER if first else Trigger.WAIT),
            when_busy=request.when_busy,
            accepted_at=self.at,
            rank=waiting[0].rank - 1 if at_head and waiting else seq,
            timeout=request.timeout,
            max_attempts=request.max_attempts,
            trace=request.trace,
            events=1,
            retry=request.retry,
            agent=agent,
        )
        self.events.append(RunEvent(run.run_id, 1, self.at, Accepted(seq)))
        self._accept_seq = seq
        self._waiting = (run, *waiting) if at_head else (*waiting, run)
        self.changes[run.run_id] = RunChange(run, request)
        return run

    def start(self, host: str) -> LaneRun:
        """Makes the first waiting run active. Only its first attempt writes the prompt."""
        head, self._waiting = self._waiting[0], self._waiting[1:]
        attempt = head.attempt + 1
        run = self._active = self._emit(
            head,
            Started(attempt),
            state=next_state(head.state, Trigger.START),
            attempt=attempt,
            turn=head.turn or self._open_turn(head),
            started_at=self.at,
            host=host,
            not_before=0,
        )
        self._record(run)
        return run

    def fold(self) -> tuple[LaneRun, ...]:
        """Folds the waiting FOLD runs of the same agent into the active turn.

        A run that has already been attempted has a turn of its own and is not folded.
        """
        host = cast("LaneRun", self._active)
        waiting_to = (run for run in self._waiting if run.when_busy is WhenBusy.FOLD)
        joining = [run for run in waiting_to if run.turn == 0 and run.agent == host.agent]
        self._remove(joining)
        folded: list[LaneRun] = []
        for waiting in sorted(joining, key=lambda run: run.accept_seq):
            event = Folded(waiting.run_id, host.run_id)
            run = advance(waiting, Trigger.FOLD, folded_into=host.run_id, turn=host.turn)
            run = self._emit(run, event)
            host = self._emit(host, event)
            folded.append(run)
            self._record(run)
        if folded:
            self._record(host)
            self._active = host
            self._folded = (*self._folded, *folded)
        return tuple(folded)

    def retry(
        self,
        content: tuple[DraftMessage, ...],
        tail: tuple[EventBody, ...] = (),
        *,
        failed: bool = False,
        not_before: Micros = 0,
    ) -> None:
        """Moves the active run back to the head, and the runs folded into it right behind it.

        The output of the attempt is dropped. The prompts of folded runs that were withdrawn are
        kept: their runs have ended and will not be folded again.
        """
        active = cast("LaneRun", self._active)
        self._drop_output(active, content)
        kept = active.asking._replace(parked=False, restarts=False, used=0, checkpoint="")
        self._active = None
        back = advance(
            self._emit(active, *tail),
            Trigger.RETRY,
            host="",
            asking=kept,
            failures=active.failures + failed,
            not_before=not_before,
        )
        self._put_back([back, *self._unfolded()])

    def _drop_output(self, active: LaneRun, content: tuple[DraftMessage, ...]) -> None:
        """Drops the output of the attempt, except for the prompts of withdrawn folded runs."""
        folded = {run.run_id for run in self._folded}
        withdrawn = (draft for draft in content if draft.run_id and draft.run_id not in folded)
        self._write(active, tuple(withdrawn), "", attempt=active.attempt)

    def _unfolded(self) -> list[LaneRun]:
        """The runs folded into the active turn, as they were before."""
        folded, self._folded = self._folded, ()
        return [advance(run, Trigger.RETRY, folded_into="", turn=0) for run in folded]

    def _put_back(self, back: list[LaneRun]) -> None:
        """Puts runs before those that wait, in this order."""
        waiting = self._waiting
        first_rank = (waiting[0].rank if waiting else self._accept_seq + 1) - len(back)
        ranked = tuple(run._replace(rank=first_rank + n) for n, run in enumerate(back))
        for run in ranked:
            self._record(run)
        self._waiting = (*ranked, *waiting)

    # Input

    def ask(
        self,
        requests: tuple[InputRequest, ...],
        closed: Mapping[str, str],
        *,
        resumable: bool,
        park: Park | None,
        tail: tuple[EventBody, ...],
    ) -> tuple[str, ...]:
        """Adds requests to the active run, and makes it wait if one of them is open.

        `closed` maps the keys of requests that were closed a moment ago to their ids.
        """
        run = self._emit(cast("LaneRun", self._active), *tail)
        held = {one.key: one for one in run.asking.pending}
        stamped = [_asked_at(request, self.at) for request in requests]
        asked = [request for request in stamped if request.question.key not in closed]
        new = [request for request in asked if request.question.key not in held]
        before = run.asking
        if len(held) + len(new) > MAX_OPEN_INPUTS or before.asked + len(new) > MAX_INPUTS:
            raise InputLimit
        held |= {request.question.key: _open_part(request) for request in new}
        for request in new:
            change = InputChange(
                request.input_request_id, run.run_id, InputState.OPEN, self.at, request
            )
            self.inputs.append(change)
        for request in asked:
            requested = _requested(request, held[request.question.key].input_request_id)
            run = self._emit(run, requested)
        if (asked or park) and run.state is RunState.ACTIVE:
            run = advance(run, Trigger.ASK)
        after = before._replace(
            pending=tuple(held.values()), asked=before.asked + len(new), resumable=resumable
        )
        if park is not None:
            after = after._replace(parked=True, used=park.used, checkpoint=park.checkpoint)
        self._active = run._replace(asking=after, host="" if park else run.host)
        self._record(self._active)
        return tuple(
            closed.get(key) or held[key].input_request_id
            for key in (request.question.key for request in requests)
        )

    def close_input(
        self, run: LaneRun, item: OpenInput, state: InputState, given: Answer | None = None
    ) -> LaneRun:
        """Closes an open request, wherever its run is."""
        left = tuple(one for one in run.asking.pending if one != item)
        late = (*run.asking.late, LateInput(state, item.input_request_id, item.key))
        self.inputs.append(
            InputChange(item.input_request_id, run.run_id, state, self.at, answer=given)
        )
        run = run._replace(asking=run.asking._replace(pending=left, late=late))
        # While the agent emits, only its supervisor knows how many events there are.
        if run.state not in {RunState.ACTIVE, RunState.CANCELLING}:
            run = self._emit_late(run)
        self._replace(run)
        return run

    def expire_input(self, run: LaneRun, item: OpenInput) -> None:
        """Expires an open request. A run that waits for it fails if there is no default."""
        given = None
        if item.default_json is not None:
            given = Answer("", item.default_json, "", "default", "", "", self.at)
        run = self.close_input(run, item, InputState.EXPIRED, given)
        if given is None and run.state is RunState.INPUT_REQUIRED:
            run = self._withdraw_inputs(run)
            expired = run.asking._replace(expired=item.input_request_id)
            self._replace(run._replace(asking=expired))

    def resume(self, host: str) -> LaneRun:
        """Makes the active run ACTIVE again: the same attempt, or one that does not count."""
        active = cast("LaneRun", self._active)
        kept = active.asking._replace(parked=False, restarts=False)
        changes: dict[str, Any] = {"state": next_state(active.state, Trigger.RESUME), "host": host}
        if active.asking.restarts:
            attempt = active.attempt + 1
            kept = kept._replace(extra_attempts=kept.extra_attempts + 1, used=0, checkpoint="")
            changes |= {"attempt": attempt, "asking": kept, "started_at": self.at}
            self._active = self._emit(active, Started(attempt), **changes)
        else:
            changes |= {"asking": kept}
            self._active = self._emit(active, Resumed(active.attempt), **changes)
        self._record(self._active)
        return self._active

    def park_for_restart(self, content: tuple[DraftMessage, ...]) -> None:
        """Leaves the active run waiting for input without a node; its output is dropped (R44)."""
        active = cast("LaneRun", self._active)
        self._drop_output(active, content)
        parked = active.asking._replace(parked=True, restarts=True)
        self._active = active._replace(asking=parked, host="")
        self._record(self._active)
        self._put_back(self._unfolded())

    def _withdraw_inputs(self, run: LaneRun) -> LaneRun:
        for item in run.asking.pending:
            run = self.close_input(run, item, InputState.WITHDRAWN)
        return run

    def _emit_late(self, run: LaneRun) -> LaneRun:
        """Writes the events of closed requests."""
        bodies = [_CLOSED[state](input_id) for state, input_id, _ in run.asking.late]
        return self._emit(run, *bodies, asking=run.asking._replace(late=()))

    def _replace(self, run: LaneRun) -> None:
        """Puts a changed run where it is in the lane."""
        if self._active is not None and self._active.run_id == run.run_id:
            self._active = run
        self._waiting = tuple(run if one.run_id == run.run_id else one for one in self._waiting)
        self._record(run)

    # Cancelling

    def cancel_active(self, reason: str) -> None:
        """Covers the active run and those folded into it. It stays active until it returns (R9)."""
        active = self._active
        if active is None:
            self._cancel_backing_off(reason)
            return
        if active.state is RunState.CANCELLING:
            return
        self._active = self._cover(active, reason)
        self._folded = tuple(self._cover(run, reason) for run in self._folded)

    def _cancel_backing_off(self, reason: str) -> None:
        """Covers the run that waits for its next attempt; its prompt is written already (R38)."""
        self.cancel_waiting([run for run in self._waiting[:1] if run.not_before], reason)

    def cancel_waiting(self, runs: Iterable[LaneRun], reason: str) -> None:
        """Ends waiting runs as cancelled on entry, and writes their turns (R14)."""
        for run in runs:
            self.covered.append(run.run_id)
            self.end_unstarted(
                self._latest(run)._replace(cancel_reason=reason),
                Trigger.CANCEL,
                FinishReason.CANCELED,
                None,
            )

    def cancel_run(self, run_id: str, reason: str) -> None:
        """Covers one run, wherever it is."""
        if self._active is not None and self._active.run_id == run_id:
            self.cancel_active(reason)
        self.cancel_waiting([run for run in self._waiting if run.run_id == run_id], reason)
        for run in self._folded:
            if run.run_id == run_id and run.state is RunState.FOLDED:
                self._withdraw(run, reason)

    def cover_reservations(
        self, only: str | None, reason: str, known: Container[str]
    ) -> list[CoveredRun]:
        """Marks reservations, so that their runs will be cancelled on entry (R10).

        A reservation that repeats the accept of a `known` run is skipped, and each run is listed
        once.
        """
        meant = [
            held
            for held in self._reservations
            if only in {None, held.run_id} and held.run_id not in known and not held.covered
        ]
        self._reservations = tuple(
            held._replace(covered=True, cancel_reason=reason) if held in meant else held
            for held in self._reservations
        )
        run_ids = dict.fromkeys(held.run_id for held in meant)
        return [CoveredRun(run_id, 0, RunState.ACCEPTED) for run_id in run_ids]

    def _cover(self, run: LaneRun, reason: str) -> LaneRun:
        self.covered.append(run.run_id)
        run = advance(self._withdraw_inputs(run), Trigger.CANCEL, cancel_reason=reason)
        self._record(run)
        return run

    def _withdraw(self, run: LaneRun, reason: str) -> None:
        """Ends a folded run alone. Its prompt stays in the turn, which continues."""
        self.covered.append(run.run_id)
        self._folded = tuple(other for other in self._folded if other.run_id != run.run_id)
        run = advance(run, Trigger.WITHDRAW, cancel_reason=reason)
        self._end(run, FinishReason.CANCELED, None)

    # Ending

    def end_turn(self, outcome: Outcome) -> RunComplete:
        """Ends the active run and those folded into it, and writes the turn (R16, R19, R22)."""
        active = cast("LaneRun", self._active)
        if active.asking.expired:
            expired = RunError(INPUT_EXPIRED, "nobody answered an input request in time")
            outcome = replace(outcome, finish_reason=FinishReason.ERROR, error=expired)
        trigger = Trigger.COMPLETE if outcome.error is None else Trigger.FAIL
        state = next_state(active.state, trigger)
        ended = self._emit(active, *outcome.tail, state=state)
        cancelled = ended.state is RunState.CANCELLED
        reason = FinishReason.CANCELED if cancelled else outcome.finish_reason
        error = None if cancelled else outcome.error
        content = close(outcome.content, reason)
        result = outcome.result if ended.state is RunState.COMPLETED else ""
        written = with_result(content, result)
        # The ordinals of an attempt that does not go on are taken.
        attempt = ended.attempt + ended.asking.restarts
        message_id = self._write(ended, written, outcome.model, attempt=attempt)
        shared = _End(reason, error, message_id, final_text(content), result)
        complete = self._end(ended, reason, error, shared, outcome.usage)
        for run in self._folded:
            self._end(advance(run, trigger), reason, error, shared)
        self._active, self._folded = None, ()
        return complete

    def end_unstarted(
        self,
        run: LaneRun,
        trigger: Trigger,
        reason: FinishReason,
        error: RunError | None,
    ) -> None:
        """Ends a waiting run without its agent, and writes its turn (R14)."""
        self._remove([run])
        run = advance(run, trigger, turn=run.turn or self._open_turn(run))
        message_id = self._write(run, close((), reason), "", attempt=run.attempt + 1)
        self._end(run, reason, error, _End(reason, error, message_id, ""))

    def _end(
        self,
        run: LaneRun,
        reason: FinishReason,
        error: RunError | None,
        turn: _End | None = None,
        usage: Usage = NO_USAGE,
    ) -> RunComplete:
        run = self._end_inputs(run)
        text, truncated = cut_utf8(turn.text if turn else "", MAX_COMPLETE_TEXT_BYTES)
        complete = RunComplete(
            session_id=self._key.session_id,
            run_id=run.run_id,
            accept_seq=run.accept_seq,
            state=run.state,
            finish_reason=reason,
            message_id=turn.message_id if turn else "",
            text=text,
            text_truncated=truncated,
            error=error,
            folded_into=run.folded_into,
            usage=usage,
            attempt=run.attempt,
            cancel_reason=run.cancel_reason,
            accepted_at=run.accepted_at,
            started_at=run.started_at,
            ended_at=self.at,
            result=turn.result if turn else "",
        )
        self._record(self._emit(run, complete), complete)
        return complete

    def _end_inputs(self, run: LaneRun) -> LaneRun:
        """Withdraws what is open, and writes the events of all closed requests (R42)."""
        if run.asking is NO_INPUT or run.asking == NO_INPUT:
            return run
        late = list(run.asking.late)
        for item in run.asking.pending:
            withdrawn = InputState.WITHDRAWN
            self.inputs.append(InputChange(item.input_request_id, run.run_id, withdrawn, self.at))
            late.append(LateInput(withdrawn, item.input_request_id, item.key))
        run = self._emit_late(run._replace(asking=run.asking._replace(late=tuple(late))))
        return run._replace(asking=NO_INPUT)

    # Writing

    def _open_turn(self, run: LaneRun) -> int:
        """Gives the run the next turn of the transcript, and writes its prompt there."""
        turn = self._turn = self._turn + 1
        self.messages.append(
            Message(
                message_id=_message_id(run.run_id, 0),
                run_id=run.run_id,
                turn=turn,
                ordinal=0,
                role=Role.USER,
                parts=(),
                finish_reason=None,
                model="",
                created_at=self.at,
            )
        )
        return turn

    def _write(
        self, run: LaneRun, content: tuple[DraftMessage, ...], model: str, *, attempt: int
    ) -> str:
        """Writes the messages of an attempt behind those of earlier attempts.

        Returns the id of the last assistant message.
        """
        last = ""
        for ordinal, draft in enumerate(content, start=(attempt - 1) * ATTEMPT_ORDINALS + 1):
            run_id = draft.run_id or run.run_id
            message_id = _message_id(run_id, ordinal)
            assistant = draft.role is Role.ASSISTANT
            self.messages.append(
                Message(
                    message_id=message_id,
                    run_id=run_id,
                    turn=run.turn,
                    ordinal=ordinal,
                    role=draft.role,
                    parts=draft.parts,
                    finish_reason=draft.finish_reason,
                    model=model if assistant else "",
                    created_at=self.at,
                )
            )
            last = message_id if assistant else last
        return last

    def _emit(self, run: LaneRun, *bodies: EventBody, **changes: Any) -> LaneRun:
        """Adds events to a run; returns the run with its other changes applied."""
        index = run.events
        for body in bodies:
            index += 1
            self.events.append(RunEvent(run.run_id, index, self.at, body))
        return run._replace(events=index, **changes)

    def _record(self, run: LaneRun, complete: RunComplete | None = None) -> None:
        before = self.changes.get(run.run_id)
        request = None if before is None else before.request
        self.changes[run.run_id] = RunChange(run, request, complete)

    # The order of the waiting

    def _remove(self, runs: Iterable[LaneRun]) -> None:
        gone = {run.run_id for run in runs}
        self._waiting = tuple(run for run in self._waiting if run.run_id not in gone)

    def _latest(self, run: LaneRun) -> LaneRun:
        return next(held for held in self._waiting if held.run_id == run.run_id)

    def _set_waiting_states(self) -> None:
        """ACCEPTED for the head of a lane without an active run, QUEUED for all others."""
        for n, run in enumerate(self._waiting):
            first = n == 0 and self._active is None
            if first and run.state is RunState.QUEUED:
                self._move(n, advance(run, Trigger.ADVANCE))
            elif not first and run.state is RunState.ACCEPTED:
                self._move(n, advance(run, Trigger.WAIT))

    def _move(self, n: int, run: LaneRun) -> None:
        self._waiting = (*self._waiting[:n], run, *self._waiting[n + 1 :])
        self._record(run)


class _End(NamedTuple):
    """The end of a turn, shared by the active run and the runs folded into it."""

    finish_reason: FinishReason
    error: RunError | None
    message_id: str
    text: str
    result: str = ""


def _asked_at(request: InputRequest, at: Micros) -> InputRequest:
    """A request with its times."""
    timeout = request.question.timeout
    return request._replace(requested_at=at, expires_at=None if timeout is None else at + timeout)


def _open_part(request: InputRequest) -> OpenInput:
    question = request.question
    return OpenInput(request.input_request_id, question.key, question.default_json)


def _requested(request: InputRequest, input_request_id: str) -> InputRequested:
    """The event of a question; an earlier attempt may have asked it under another id."""
    question = request.question
    return InputRequested(
        input_request_id,
        question.key,
        question.kind,
        question.text,
        question.tool_name,
        question.arguments_json,
        json.dumps(question.choices),
        question.schema_json,
        request.expires_at or 0,
        question.digest,
    )


_CLOSED: Mapping[InputState, type[InputAnswered | InputWithdrawn | InputExpired]] = (
    MappingProxyType(
        {
            InputState.ANSWERED: InputAnswered,
            InputState.WITHDRAWN: InputWithdrawn,
            InputState.EXPIRED: InputExpired,
        }
    )
)


def _message_id(run_id: str, ordinal: int) -> str:
    """Unique because run ids are: the part before the last dash is the run id."""
    return f"{run_id}-m{ordinal}"
