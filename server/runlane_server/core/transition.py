"""The records that a lane consists of, and what a command makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

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
from runlane_server.core.turn import DraftMessage


class LaneRun(NamedTuple):
    """A run as far as its lane needs to know it. Its prompt stays in the store.

    `rank` orders the waiting runs; `turn` is its place in the transcript, 0 before it has one;
    `events` counts the events it has so far; `trace` is where in a trace its caller is; `host` is
    the node where it is active, if the store is shared by several.
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


class Reservation(NamedTuple):
    """An accept that has begun and is not durable yet (R6). `covered`: a cancel met it."""

    token: str
    run_id: str
    covered: bool = False
    cancel_reason: str = ""


class Lane(NamedTuple):
    """The coordination state of one session, as of one version.

    Version 0 is a session that does not exist. `reservations` belong to this process and are not
    stored. The active run is ACTIVE or CANCELLING; `folded` are the runs that joined its turn.
    """

    key: SessionKey
    version: int = 0
    accept_seq: int = 0
    turn: int = 0
    active: LaneRun | None = None
    folded: tuple[LaneRun, ...] = ()
    waiting: tuple[LaneRun, ...] = ()
    reservations: tuple[Reservation, ...] = ()

    @property
    def exists(self) -> bool:
        """Whether the session is stored."""
        return self.version > 0

    @property
    def is_busy(self) -> bool:
        """Whether it has work, or work on its way in (R8, R9)."""
        return self.active is not None or bool(self.waiting) or bool(self.reservations)

    @property
    def can_start(self) -> bool:
        """Whether `dispatch` would start a run."""
        return self.active is None and bool(self.waiting)

    def find(self, run_id: str) -> LaneRun | None:
        """That run, if it is not terminal."""
        if self.active is not None and self.active.run_id == run_id:
            return self.active
        return next((run for run in (*self.folded, *self.waiting) if run.run_id == run_id), None)

    def at_version(self, version: int) -> Lane:
        """The same, at that version."""
        # What every command does is written out: _replace takes four times as long.
        return Lane(
            self.key,
            version,
            self.accept_seq,
            self.turn,
            self.active,
            self.folded,
            self.waiting,
            self.reservations,
        )

    @property
    def runs(self) -> tuple[LaneRun, ...]:
        """All its runs that are not terminal, in accept order."""
        active = () if self.active is None else (self.active,)
        return tuple(sorted((*active, *self.folded, *self.waiting), key=lambda run: run.accept_seq))


class RunChange(NamedTuple):
    """A run as a transition leaves it; with its request if it is new, its end if it ended."""

    run: LaneRun
    request: RunRequest | None = None
    complete: RunComplete | None = None


@dataclass(frozen=True, slots=True)
class CoveredRun:
    """A run that a cancel covered, with the state it was in.

    A reservation is named as ACCEPTED with accept_seq 0, as it has no place in the order yet.
    """

    run_id: str
    accept_seq: int
    state: RunState


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a cancel covered, and the last accept_seq it could have covered (R20)."""

    session_id: str
    cancelled: tuple[CoveredRun, ...] = ()
    fence_accept_seq: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an agent's turn ended: `error` is None where it ended well."""

    finish_reason: FinishReason
    error: RunError | None = None
    content: tuple[DraftMessage, ...] = ()
    tail: tuple[EventBody, ...] = ()
    usage: Usage = NO_USAGE
    model: str = ""


class Transition(NamedTuple):
    """What a command makes of a lane, and all that is to be committed with it."""

    lane: Lane
    runs: tuple[RunChange, ...] = ()
    messages: tuple[Message, ...] = ()
    events: tuple[RunEvent, ...] = ()
    reply: Any = None
    removed: bool = False

    @property
    def needs_commit(self) -> bool:
        """Whether there is anything to commit. Reservations are not stored."""
        return bool(self.runs) or self.removed

    @property
    def completes(self) -> tuple[RunComplete, ...]:
        """The terminal events, in order."""
        return tuple([e.body for e in self.events if isinstance(e.body, RunComplete)])

    def at_version(self, version: int) -> Transition:
        """The same, leading to that version of the lane."""
        lane = self.lane.at_version(version)
        return Transition(
            lane, self.runs, self.messages, self.events, self.reply, removed=self.removed
        )

    def then(self, later: Transition) -> Transition:
        """This transition and a later one as a single one; the later reply counts."""
        if not self.runs:
            # Nothing but reservations came before: what is written has runs.
            return later
        if not (later.runs or later.removed):
            return self._replace(lane=later.lane, reply=later.reply)
        merged = {change.run.run_id: change for change in self.runs}
        for change in later.runs:
            before = merged.get(change.run.run_id)
            request = change.request if before is None else before.request
            merged[change.run.run_id] = change._replace(request=request)
        return Transition(
            later.lane,
            tuple(merged.values()),
            self.messages + later.messages,
            self.events + later.events,
            later.reply,
            later.removed,
        )


def describe(
    key: SessionKey, run: LaneRun, request: RunRequest, complete: RunComplete | None = None
) -> Run:
    """The run as it is shown to callers."""
    return Run(
        session_id=key.session_id,
        run_id=run.run_id,
        accept_seq=run.accept_seq,
        state=run.state,
        when_busy=request.when_busy,
        prompt_excerpt=request.prompt.excerpt,
        prompt_fingerprint=request.prompt.fingerprint,
        metadata=request.metadata,
        timeout=request.timeout,
        max_attempts=request.max_attempts,
        attempt=run.attempt,
        accepted_at=run.accepted_at,
        started_at=run.started_at,
        ended_at=complete.ended_at if complete else None,
        folded_into=run.folded_into,
        complete=complete,
    )
