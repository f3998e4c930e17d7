"""The state of a lane, and the transitions that commands make of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, NamedTuple, cast

from typing_extensions import TypeVar

from runlane_server.core.input import NO_INPUT, InputChange, RunInput
from runlane_server.core.model import (
    NO_USAGE,
    EventBody,
    FinishReason,
    Message,
    Micros,
    Run,
    RunComplete,
    RunError,
    RunEvent,
    RunRequest,
    RunState,
    SessionKey,
    Usage,
    WhenBusy,
)
from runlane_server.core.retry import RetryPolicy
from runlane_server.core.turn import DraftMessage
from runlane_server.core.update import RunEdit

Reply_co = TypeVar("Reply_co", covariant=True, default=object)
"""The type of the reply that a caller gets once the transition of its command is committed."""

Other = TypeVar("Other")


class LaneRun(NamedTuple):
    """The part of a run that its lane needs. The prompt stays in the store.

    `rank` orders the waiting runs. `turn` is the number of its turn in the transcript, 0 before it
    has one. `events` counts its events so far. `trace` is the caller's `traceparent`. `host` is the
    id of the node where it is active, empty unless the store is shared. `agent` is empty for a run
    from before agents had names. `failures` counts the attempts that its agent failed, and
    `not_before` is when the next one may start; 0 for a run that waits for no retry (R38).
    `revision` counts the updates while it waited, and `last_update` has the digests of the
    last ones (`core.update.remembered`).
    """

    run_id: str
    accept_seq: int
    state: RunState
    when_busy: WhenBusy
    accepted_at: Micros
    rank: int
    timeout: Micros | None = None
    max_attempts: int = 1
    attempt: int = 0
    turn: int = 0
    events: int = 0
    started_at: Micros | None = None
    folded_into: str = ""
    cancel_reason: str = ""
    trace: str = ""
    host: str = ""
    agent: str = ""
    retry: RetryPolicy | None = None
    failures: int = 0
    not_before: Micros = 0
    asking: RunInput = NO_INPUT
    revision: int = 0
    last_update: str = ""


class Reservation(NamedTuple):
    """An accept that has begun and is not durable yet (R6). `covered`: a cancel covers it."""

    token: str
    run_id: str
    covered: bool = False
    cancel_reason: str = ""


class Lane(NamedTuple):
    """The coordination state of one session at one version.

    Version 0 means that the session does not exist. The active run is ACTIVE, INPUT_REQUIRED or
    CANCELLING;
    `folded` are the runs that joined its turn. `reservations` exist only in this process and are
    not stored. `agent` is the agent of runs that name none, empty for the server's default.
    `is_being_removed`: the last session with this id was deleted, and its rows are not all gone.
    """

    key: SessionKey
    version: int = 0
    accept_seq: int = 0
    turn: int = 0
    active: LaneRun | None = None
    folded: tuple[LaneRun, ...] = ()
    waiting: tuple[LaneRun, ...] = ()
    reservations: tuple[Reservation, ...] = ()
    agent: str = ""
    is_being_removed: bool = False

    @property
    def exists(self) -> bool:
        """Whether the session exists."""
        return self.version > 0

    @property
    def is_busy(self) -> bool:
        """Whether the session has runs or reservations (R8, R9)."""
        return self.active is not None or bool(self.waiting) or bool(self.reservations)

    @property
    def can_start(self) -> bool:
        """Whether a run is to be started, now or after its backoff."""
        return self.active is None and bool(self.waiting)

    def can_start_at(self, at: Micros) -> bool:
        """Whether `dispatch` would start a run at that time."""
        return self.can_start and self.waiting[0].not_before <= at

    @property
    def backing_off(self) -> LaneRun | None:
        """The run whose agent failed and that waits for its next attempt (R38)."""
        head = self.waiting[0] if self.can_start else None
        return head if head is not None and head.not_before else None

    @property
    def active_run_id(self) -> str:
        """The run that is at work, or waits for its next attempt (R38); empty without one."""
        run = self.active or self.backing_off
        return "" if run is None else run.run_id

    @property
    def queue(self) -> tuple[LaneRun, ...]:
        """The waiting runs, without the one that waits for its next attempt."""
        return self.waiting if self.backing_off is None else self.waiting[1:]

    @property
    def can_resume(self) -> bool:
        """Whether the active run has all its answers and waits for a slot (R41)."""
        active = self.active
        return (
            active is not None
            and active.state is RunState.INPUT_REQUIRED
            and not (active.asking.pending or active.asking.expired)
        )

    def find(self, run_id: str) -> LaneRun | None:
        """The run with this id; None if it has ended or is unknown."""
        if self.active is not None and self.active.run_id == run_id:
            return self.active
        return next((run for run in (*self.folded, *self.waiting) if run.run_id == run_id), None)

    def at_version(self, version: int) -> Lane:
        """A copy at the given version."""
        # Written out because it is on the path of every command: _replace takes four times as long.
        return Lane(
            self.key,
            version,
            self.accept_seq,
            self.turn,
            self.active,
            self.folded,
            self.waiting,
            self.reservations,
            self.agent,
        )

    @property
    def runs(self) -> tuple[LaneRun, ...]:
        """All runs that have not ended, in accept order."""
        active = () if self.active is None else (self.active,)
        return tuple(sorted((*active, *self.folded, *self.waiting), key=lambda run: run.accept_seq))


class RunChange(NamedTuple):
    """A run after a transition; with its request if it is new, its end if it ended, and what was
    updated of it."""

    run: LaneRun
    request: RunRequest | None = None
    complete: RunComplete | None = None
    edit: RunEdit | None = None


@dataclass(frozen=True, slots=True)
class CoveredRun:
    """A run that a cancel covered, with its state before the cancel (R20).

    A reservation is listed as ACCEPTED with accept_seq 0: it has no place in the order yet.
    """

    run_id: str
    accept_seq: int
    state: RunState


@dataclass(frozen=True, slots=True)
class Receipt:
    """The runs that a cancel covered, and the last accept_seq it could have covered (R20).

    `unreadable`: the stored lane is damaged, and nothing of it was cancelled.
    """

    session_id: str
    cancelled: tuple[CoveredRun, ...] = ()
    fence_accept_seq: int = 0
    unreadable: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an agent's turn ended; `error` is None if it completed.

    `tail` are the last events of the run, which are not stored yet. `result` is the structured
    result, as JSON; it counts only if the turn completed. `is_final`: no retry policy applies.
    """

    finish_reason: FinishReason
    error: RunError | None = None
    content: tuple[DraftMessage, ...] = ()
    tail: tuple[EventBody, ...] = ()
    usage: Usage = NO_USAGE
    model: str = ""
    result: str = ""
    is_final: bool = False


class Transition(NamedTuple, Generic[Reply_co]):
    """The lane after a command, everything to commit with it, and the reply to the caller.

    `removed`: the session is deleted.
    """

    lane: Lane
    runs: tuple[RunChange, ...] = ()
    messages: tuple[Message, ...] = ()
    events: tuple[RunEvent, ...] = ()
    # Without a reply the type is Transition[None].
    reply: Reply_co = cast("Reply_co", None)
    removed: bool = False
    inputs: tuple[InputChange, ...] = ()

    @property
    def needs_commit(self) -> bool:
        """Whether there is anything to commit. Reservations are not stored."""
        return bool(self.runs) or self.removed

    @property
    def completes(self) -> tuple[RunComplete, ...]:
        """The terminal events of the transition, in order."""
        return tuple([e.body for e in self.events if isinstance(e.body, RunComplete)])

    def at_version(self, version: int) -> Transition[Reply_co]:
        """A copy that leads to the given version of the lane."""
        lane = self.lane.at_version(version)
        return Transition(
            lane, self.runs, self.messages, self.events, self.reply, self.removed, self.inputs
        )

    def replying(self, reply: Other) -> Transition[Other]:
        """A copy with another reply."""
        return Transition(
            self.lane, self.runs, self.messages, self.events, reply, self.removed, self.inputs
        )

    def then(self, later: Transition[Other]) -> Transition[Other]:
        """Merges this transition with the next one, which provides the reply."""
        if not self.runs:
            # Only reservations changed before: everything that is stored comes with runs.
            return later
        if not (later.runs or later.removed):
            return self.replying(later.reply)._replace(lane=later.lane)
        merged = {change.run.run_id: change for change in self.runs}
        for change in later.runs:
            before = merged.get(change.run.run_id)
            if before is not None:
                edit = change.edit if before.edit is None else before.edit.then(change.edit)
                change = change._replace(request=before.request, edit=edit)  # noqa: PLW2901
            merged[change.run.run_id] = change
        return Transition(
            later.lane,
            tuple(merged.values()),
            self.messages + later.messages,
            self.events + later.events,
            later.reply,
            later.removed,
            _merged(self.inputs, later.inputs),
        )


def _merged(
    earlier: tuple[InputChange, ...], later: tuple[InputChange, ...]
) -> tuple[InputChange, ...]:
    if not (earlier and later):
        return earlier or later
    merged = {change.input_request_id: change for change in earlier}
    for change in later:
        before = merged.get(change.input_request_id)
        request = change.request if before is None else before.request
        merged[change.input_request_id] = change._replace(request=request)
    return tuple(merged.values())


def describe(
    key: SessionKey, run: LaneRun, request: RunRequest, complete: RunComplete | None = None
) -> Run:
    """The run as callers see it."""
    return Run(
        session_id=key.session_id,
        run_id=run.run_id,
        accept_seq=run.accept_seq,
        state=run.state,
        when_busy=request.when_busy,
        prompt_excerpt=request.prompt.excerpt,
        prompt_fingerprint=request.fingerprint,
        metadata=request.metadata,
        timeout=request.timeout,
        max_attempts=request.max_attempts,
        attempt=run.attempt,
        accepted_at=run.accepted_at,
        started_at=run.started_at,
        ended_at=complete.ended_at if complete else None,
        folded_into=run.folded_into,
        complete=complete,
        agent=run.agent,
        retry=request.retry,
        last_event_index=run.events,
        revision=run.revision,
        last_update=run.last_update,
    )
