"""The lane of a session: which run is active, which wait, and what a command makes of them.

All rules of ordering and of the race between accept, cancel and complete are decided here. Each
command is a plain function from a lane to a `Transition`; an illegal one raises and changes
nothing.
`TABLE` says what may happen to one run; the functions say to which runs it happens.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from enum import StrEnum
from itertools import takewhile
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, cast

from runlane_server.core.errors import (
    IllegalCommand,
    QueueFull,
    SessionBusy,
    SessionNotFound,
)
from runlane_server.core.model import (
    MAX_COMPLETE_TEXT_BYTES,
    NO_USAGE,
    Accepted,
    CancelScope,
    EventBody,
    FinishReason,
    Folded,
    Message,
    Micros,
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
from runlane_server.core.turn import DraftMessage, close, final_text

Reply = TypeVar("Reply")


class Trigger(StrEnum):
    """What can happen to one run."""

    ENTER = "enter"  # it is accepted, and is first in its lane
    WAIT = "wait"  # another run is, or now goes, before it
    ADVANCE = "advance"  # it becomes first in its lane
    START = "start"  # its agent is started
    FOLD = "fold"  # it joins the active turn
    CANCEL = "cancel"  # a cancel covers it, or the run whose turn it joined
    WITHDRAW = "withdraw"  # a cancel covers it alone, and the turn it joined goes on
    COMPLETE = "complete"  # its turn ends well
    FAIL = "fail"  # its turn ends badly, or it can never start
    RETRY = "retry"  # its node was lost, and it is to start again


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
        (_S.FOLDED, _H.CANCEL): _S.CANCELLING,
        (_S.FOLDED, _H.WITHDRAW): _S.CANCELLED,
        (_S.FOLDED, _H.COMPLETE): _S.COMPLETED,
        (_S.FOLDED, _H.FAIL): _S.FAILED,
        (_S.FOLDED, _H.RETRY): _S.QUEUED,
        # A cancel that was answered stays in force, however the turn ends (R19).
        (_S.CANCELLING, _H.COMPLETE): _S.CANCELLED,
        (_S.CANCELLING, _H.FAIL): _S.CANCELLED,
    }
)
"""What may happen to a run in which state, and where that leads. All else is illegal."""


ATTEMPT_ORDINALS = 1 << 20
"""How many places of a turn each attempt has: more messages than any has."""


# --- Accept -------------------------------------------------------------------------------------


def reserve(lane: Lane, token: str, run_id: str) -> Transition[None]:
    """Begins an accept: the session is busy from here on, and a cancel covers it (R6, R8, R10).

    A repeated accept of a run that a receipt has named already is covered with it.
    """
    if any(reservation.token == token for reservation in lane.reservations):
        raise IllegalCommand(f"reservation {token} is held already")
    same_run = (held for held in lane.reservations if held.run_id == run_id)
    covered = next((held for held in same_run if held.covered), None)
    reservation = covered._replace(token=token) if covered else Reservation(token, run_id)
    return Transition(lane._replace(reservations=(*lane.reservations, reservation)))


def release(lane: Lane, token: str) -> Transition[None]:
    """Ends a reservation; where there is none (any more) it does nothing (R6)."""
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
) -> Transition[LaneRun]:
    """Makes a reservation a run. Replies with its LaneRun, or with the one of that id in the lane.

    Raises SessionNotFound (R2), SessionBusy (REJECT, R27) and QueueFull, and IllegalCommand without
    the reservation.
    """
    held = next((held for held in lane.reservations if held.token == token), None)
    if held is None:
        raise IllegalCommand(f"there is no reservation {token}")
    edit = _Edit(lane, at)
    edit.release(token)
    known = lane.find(request.run_id)
    if known is not None:
        return edit.done(reply=known)
    _check_room(lane, held, request, allow_missing=allow_missing, max_waiting=max_waiting)
    if request.when_busy is WhenBusy.INTERRUPT and not held.covered:
        edit.cancel_active("interrupted by " + request.run_id)
    run = edit.enter(request)
    if held.covered:
        edit.cancel_waiting([run], held.cancel_reason)
    return edit.done(reply=edit.current(run))


def _check_room(
    lane: Lane, held: Reservation, request: RunRequest, *, allow_missing: bool, max_waiting: int
) -> None:
    if not (lane.exists or allow_missing):
        raise SessionNotFound.of(lane.key.session_id)
    behind_another = lane.active is not None or bool(lane.waiting)
    # Only who reserved earlier is in the way: of a burst that all reject, one gets in.
    earlier = takewhile(lambda other: other.token != held.token, lane.reservations)
    beaten = any(other.run_id != held.run_id for other in earlier)
    if request.when_busy is WhenBusy.REJECT and (behind_another or beaten):
        raise SessionBusy(f"session {lane.key.session_id!r} has work")
    if behind_another and len(lane.waiting) >= max_waiting:
        raise QueueFull(
            f"{len(lane.waiting)} runs wait in session {lane.key.session_id!r}, as many as may"
        )


def dispatch(lane: Lane, *, at: Micros, host: str = "") -> Transition[LaneRun | None]:
    """Starts the first waiting run on that node, if none is active (R7, R8). Replies with it, or
    with None."""
    edit = _Edit(lane, at)
    return edit.done(reply=edit.start(host) if lane.can_start else None)


# --- Cancel -------------------------------------------------------------------------------------


def cancel(
    lane: Lane, scope: CancelScope, *, at: Micros, run_id: str = "", reason: str = ""
) -> Transition[Receipt]:
    """Covers what is accepted and not terminal now, and replies with the Receipt (R10 to R16, R20).

    Where there is nothing to cover, nothing changes (R12, R13). `run_id` goes with scope RUN; a run
    that is not in the lane has ended, and is not covered.
    """
    edit = _Edit(lane, at)
    before = {run.run_id: run for run in lane.runs}
    if scope is CancelScope.RUN:
        edit.cancel_run(run_id, reason)
    if scope in {CancelScope.SESSION, CancelScope.ACTIVE}:
        edit.cancel_active(reason)
    if scope in {CancelScope.SESSION, CancelScope.WAITING}:
        edit.cancel_waiting(lane.waiting, reason)
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
    lane: Lane, run_id: str, attempt: int, *, at: Micros, events: int
) -> Transition[tuple[LaneRun, ...]]:
    """Folds what waits to be folded into the active turn, in accept order (R26, R27).

    `events` is how many events the active run has by now. Replies with the runs folded: none where
    the active run has been cancelled. Raises IllegalCommand if the attempt is not the active one.
    """
    active = _the_active(lane, run_id, attempt)
    edit = _Edit(lane, at)
    edit.count(active, events)
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
) -> Transition[RunComplete]:
    """Ends the active run and those folded into it; the first waiting one may be dispatched next.

    Where a cancel covered it before, it is cancelled whatever the outcome (R19). Replies with its
    RunComplete. Raises IllegalCommand if the attempt is not the active one: it was fenced off.
    `cancelled` is the reason of the cancel that its agent was stopped for, should that not be
    written yet.
    """
    active = _the_active(lane, run_id, attempt)
    edit = _Edit(lane, at)
    edit.count(active, events)
    if cancelled is not None:
        edit.cancel_active(cancelled)
    return edit.done(reply=edit.end_turn(outcome))


def node_lost(
    lane: Lane,
    run_id: str,
    attempt: int,
    *,
    at: Micros,
    content: tuple[DraftMessage, ...],
    events: int,
) -> Transition[bool]:
    """The node of an attempt is gone: the run is retried or ends INTERRUPTED.

    `content` and `events` are what the store has of the attempt. A cancel that was answered stays
    in force. Replies with whether the attempt was still active: another node may have seen to it.
    """
    active = lane.active
    if active is None or (active.run_id, active.attempt) != (run_id, attempt):
        return Transition(lane, reply=False)
    return _give_up(lane, active, content, (), at=at, events=events)


def hand_over(
    lane: Lane, run_id: str, attempt: int, outcome: Outcome, *, at: Micros, events: int
) -> Transition[bool]:
    """The node of the active run stops and gives the run up: as `node_lost`, in good order.

    Of the outcome only what was said counts. Raises IllegalCommand if the attempt is not the active
    one.
    """
    active = _the_active(lane, run_id, attempt)
    return _give_up(lane, active, outcome.content, outcome.tail, at=at, events=events)


def _give_up(
    lane: Lane,
    active: LaneRun,
    content: tuple[DraftMessage, ...],
    tail: tuple[EventBody, ...],
    *,
    at: Micros,
    events: int,
) -> Transition[bool]:
    edit = _Edit(lane, at)
    edit.count(active, events)
    if active.state is RunState.ACTIVE and active.attempt < active.max_attempts:
        edit.retry(content)
    else:
        error = RunError("INTERRUPTED", "the node that ran it was lost")
        edit.end_turn(Outcome(FinishReason.INTERRUPTED, error, content, tail))
    return edit.done(reply=True)


def fail_waiting(lane: Lane, error: RunError, *, at: Micros) -> Transition[int]:
    """Ends all waiting runs as failed before they started (R30). Replies with how many."""
    edit = _Edit(lane, at)
    for run in lane.waiting:
        edit.end_unstarted(run, Trigger.FAIL, FinishReason.ERROR, error)
    return edit.done(reply=len(lane.waiting))


def remove(lane: Lane, *, unchanged_since: tuple[int, int] | None = None) -> Transition[None]:
    """Removes an idle session; with a (version, accept_seq), only as it was then.

    Raises SessionNotFound and SessionBusy.
    """
    if not lane.exists:
        raise SessionNotFound.of(lane.key.session_id)
    # A run that came and went within the commit at hand is in accept_seq, and not in the version.
    if unchanged_since not in {None, (lane.version, lane.accept_seq)}:
        raise SessionBusy(f"session {lane.key.session_id!r} is in use again")
    if lane.is_busy:
        raise SessionBusy(f"session {lane.key.session_id!r} has work; cancel it first")
    return Transition(Lane(lane.key), removed=True)


def _the_active(lane: Lane, run_id: str, attempt: int) -> LaneRun:
    active = lane.active
    if active is None or (active.run_id, active.attempt) != (run_id, attempt):
        raise IllegalCommand(f"attempt {attempt} of run {run_id} is not active")
    return active


# --- How a lane is changed ----------------------------------------------------------------------


def advance(run: LaneRun, trigger: Trigger, **changes: Any) -> LaneRun:
    """The run after a trigger, by `TABLE`. Raises IllegalCommand where that has no entry."""
    return run._replace(state=next_state(run.state, trigger), **changes)


def next_state(state: RunState | None, trigger: Trigger) -> RunState:
    """The state after a trigger; None is that of a run that has not entered its lane."""
    after = TABLE.get((state, trigger))
    if after is None:
        raise IllegalCommand(f"a run that is {state} cannot {trigger}")
    return after


class _Edit:
    """A lane under change: collects what a transition consists of. Lives for one command."""

    def __init__(self, lane: Lane, at: Micros) -> None:
        self.at = at
        self.changes: dict[str, RunChange] = {}
        self.messages: list[Message] = []
        self.events: list[RunEvent] = []
        self.covered: list[str] = []
        self._key = lane.key
        self._version = lane.version
        self._accept_seq = lane.accept_seq
        self._turn = lane.turn
        self._active = lane.active
        self._folded = lane.folded
        self._waiting = lane.waiting
        self._reservations = lane.reservations

    def done(self, reply: Reply) -> Transition[Reply]:
        """The transition, with the waiting runs in the states that their places give them."""
        self._line_up()
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
            ),
            tuple(self.changes.values()),
            tuple(self.messages),
            tuple(self.events),
            reply,
        )

    def current(self, run: LaneRun) -> LaneRun:
        """The run as it is by now."""
        self._line_up()
        return self.changes[run.run_id].run

    def count(self, active: LaneRun, events: int) -> None:
        """The active run has so many events by now."""
        self._active = active._replace(events=events)

    # Entering

    def release(self, token: str) -> None:
        """Ends a reservation."""
        self._reservations = tuple([held for held in self._reservations if held.token != token])

    def enter(self, request: RunRequest) -> LaneRun:
        """Puts a new run into the lane: at the end, or at the head if it interrupts."""
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
        )
        self.events.append(RunEvent(run.run_id, 1, self.at, Accepted(seq)))
        self._accept_seq = seq
        self._waiting = (run, *waiting) if at_head else (*waiting, run)
        self.changes[run.run_id] = RunChange(run, request)
        return run

    def start(self, host: str) -> LaneRun:
        """Makes the first waiting run the active one. Its prompt enters the transcript once."""
        head, self._waiting = self._waiting[0], self._waiting[1:]
        attempt = head.attempt + 1
        run = self._active = self._tell(
            head,
            Started(attempt),
            state=next_state(head.state, Trigger.START),
            attempt=attempt,
            turn=head.turn or self._open_turn(head),
            started_at=self.at,
            host=host,
        )
        self._note(run)
        return run

    def fold(self) -> tuple[LaneRun, ...]:
        """Takes the runs that wait to be folded into the active turn.

        Not one that an attempt was made at: it has a turn of its own in the transcript already.
        """
        host = cast("LaneRun", self._active)
        waiting_to = (run for run in self._waiting if run.when_busy is WhenBusy.FOLD)
        joining = [run for run in waiting_to if run.turn == 0]
        self._remove(joining)
        folded: list[LaneRun] = []
        for waiting in sorted(joining, key=lambda run: run.accept_seq):
            event = Folded(waiting.run_id, host.run_id)
            run = advance(waiting, Trigger.FOLD, folded_into=host.run_id, turn=host.turn)
            run = self._tell(run, event)
            host = self._tell(host, event)
            folded.append(run)
            self._note(run)
        if folded:
            self._note(host)
            self._active = host
            self._folded = (*self._folded, *folded)
        return tuple(folded)

    def retry(self, content: tuple[DraftMessage, ...]) -> None:
        """Puts the active run back to the head, and the runs folded into it right behind it.

        What was said is void. The prompts of runs that have ended by themselves are not: nobody
        brings them again.
        """
        active = cast("LaneRun", self._active)
        folded = {run.run_id for run in self._folded}
        withdrawn = (draft for draft in content if draft.run_id and draft.run_id not in folded)
        self._write(active, tuple(withdrawn), "", attempt=active.attempt)
        back = [advance(active, Trigger.RETRY, host="")]
        back += [advance(run, Trigger.RETRY, folded_into="", turn=0) for run in self._folded]
        waiting = self._waiting
        first_rank = (waiting[0].rank if waiting else self._accept_seq + 1) - len(back)
        ranked = tuple(run._replace(rank=first_rank + n) for n, run in enumerate(back))
        self._active, self._folded = None, ()
        for run in ranked:
            self._note(run)
        self._waiting = (*ranked, *waiting)

    # Cancelling

    def cancel_active(self, reason: str) -> None:
        """Covers the active run and those folded into it; it stays active until it returns (R9)."""
        active = self._active
        if active is None or active.state is RunState.CANCELLING:
            return
        self._active = self._cover(active, reason)
        self._folded = tuple(self._cover(run, reason) for run in self._folded)

    def cancel_waiting(self, runs: Iterable[LaneRun], reason: str) -> None:
        """Ends waiting runs as cancelled on entry, with their turns written (R14)."""
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
        """Marks the accepts that have begun: they will be cancelled on entry (R10).

        The repeated accept of a `known` run brings nothing new, and a run is named once.
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
        run = advance(run, Trigger.CANCEL, cancel_reason=reason)
        self._note(run)
        return run

    def _withdraw(self, run: LaneRun, reason: str) -> None:
        """Ends a folded run by itself: its prompt is part of the turn, which goes on."""
        self.covered.append(run.run_id)
        self._folded = tuple(other for other in self._folded if other.run_id != run.run_id)
        run = advance(run, Trigger.WITHDRAW, cancel_reason=reason)
        self._end(run, FinishReason.CANCELED, None)

    # Ending

    def end_turn(self, outcome: Outcome) -> RunComplete:
        """Ends the active run and those folded into it, and writes the turn (R16, R19, R22)."""
        active = cast("LaneRun", self._active)
        trigger = Trigger.COMPLETE if outcome.error is None else Trigger.FAIL
        state = next_state(active.state, trigger)
        ended = self._tell(active, *outcome.tail, state=state)
        cancelled = ended.state is RunState.CANCELLED
        reason = FinishReason.CANCELED if cancelled else outcome.finish_reason
        error = None if cancelled else outcome.error
        content = close(outcome.content, reason)
        message_id = self._write(ended, content, outcome.model, attempt=ended.attempt)
        shared = _End(reason, error, message_id, final_text(content))
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
        )
        self._note(self._tell(run, complete), complete)
        return complete

    # Writing

    def _open_turn(self, run: LaneRun) -> int:
        """Gives the run a place in the transcript, and writes its prompt there."""
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
        """Writes what an attempt leaves behind in its turn; returns the id of its last assistant
        message. It stands behind what earlier attempts left."""
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

    def _tell(self, run: LaneRun, *bodies: EventBody, **changes: Any) -> LaneRun:
        """The run with more events, and with what else changes."""
        index = run.events
        for body in bodies:
            index += 1
            self.events.append(RunEvent(run.run_id, index, self.at, body))
        return run._replace(events=index, **changes)

    def _note(self, run: LaneRun, complete: RunComplete | None = None) -> None:
        before = self.changes.get(run.run_id)
        request = None if before is None else before.request
        self.changes[run.run_id] = RunChange(run, request, complete)

    # The order of the waiting

    def _remove(self, runs: Iterable[LaneRun]) -> None:
        gone = {run.run_id for run in runs}
        self._waiting = tuple(run for run in self._waiting if run.run_id not in gone)

    def _latest(self, run: LaneRun) -> LaneRun:
        return next(held for held in self._waiting if held.run_id == run.run_id)

    def _line_up(self) -> None:
        """The head of a lane without an active run is ACCEPTED; all others are QUEUED."""
        for n, run in enumerate(self._waiting):
            first = n == 0 and self._active is None
            if first and run.state is RunState.QUEUED:
                self._move(n, advance(run, Trigger.ADVANCE))
            elif not first and run.state is RunState.ACCEPTED:
                self._move(n, advance(run, Trigger.WAIT))

    def _move(self, n: int, run: LaneRun) -> None:
        self._waiting = (*self._waiting[:n], run, *self._waiting[n + 1 :])
        self._note(run)


class _End(NamedTuple):
    """How a turn ended, as the runs that share it see it."""

    finish_reason: FinishReason
    error: RunError | None
    message_id: str
    text: str


def _message_id(run_id: str, ordinal: int) -> str:
    """Unique as run ids are: what stands before the last dash names the run."""
    return f"{run_id}-m{ordinal}"
