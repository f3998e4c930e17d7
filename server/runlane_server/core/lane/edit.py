"""A lane while one command changes it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from runlane_server.core.errors import IllegalCommand
from runlane_server.core.input import InputChange
from runlane_server.core.lane.states import Trigger, advance
from runlane_server.core.model import (
    EventBody,
    Message,
    Micros,
    Role,
    RunComplete,
    RunEvent,
    RunState,
)
from runlane_server.core.transition import Lane, LaneRun, RunChange, Transition
from runlane_server.core.turn import DraftMessage
from runlane_server.core.update import RunEdit

Reply = TypeVar("Reply")

ATTEMPT_ORDINALS = 1 << 20
"""Number of message ordinals reserved for each attempt: more than any attempt writes."""

RANK_STEP = 1 << 20
"""Distance between the ranks of two runs that enter a queue, so that others fit in between."""

FIRST_RANK = -(1 << 50)
"""Rank of a run that enters an empty queue.

Ranks stay at or below the accept_seq of the lane: releases that cannot move runs append one with
its accept_seq as its rank, and must find nothing behind it (R7).
"""


def the_active(lane: Lane, run_id: str, attempt: int, host: str | None = None) -> LaneRun:
    """The active run. Raises IllegalCommand if this attempt is not active, or not on that node."""
    active = lane.active
    if active is None or (active.run_id, active.attempt) != (run_id, attempt):
        raise IllegalCommand(f"attempt {attempt} of run {run_id} is not active")
    if host not in {None, active.host}:
        raise IllegalCommand(f"attempt {attempt} of run {run_id} continues on another node")
    return active


class Edit:
    """A lane that one command is changing; collects the parts of the transition."""

    def __init__(self, lane: Lane, at: Micros) -> None:
        self.at = at
        self.changes: dict[str, RunChange] = {}
        self.messages: list[Message] = []
        self.events: list[RunEvent] = []
        self.inputs: list[InputChange] = []
        self.covered: list[str] = []
        self.key = lane.key
        self.version = lane.version
        self.accept_seq = lane.accept_seq
        self.turn = lane.turn
        self.active = lane.active
        self.folded = lane.folded
        self.waiting = lane.waiting
        self.reservations = lane.reservations
        self.agent = lane.agent

    def done(self, reply: Reply) -> Transition[Reply]:
        """Builds the transition, after setting the states of the waiting runs."""
        self._set_waiting_states()
        return Transition(
            Lane(
                self.key,
                self.version,
                self.accept_seq,
                self.turn,
                self.active,
                self.folded,
                self.waiting,
                self.reservations,
                self.agent,
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

    def emit(self, run: LaneRun, *bodies: EventBody, **changes: Any) -> LaneRun:
        """Adds events to a run; returns the run with its other changes applied."""
        index = run.events
        for body in bodies:
            index += 1
            self.events.append(RunEvent(run.run_id, index, self.at, body))
        return run._replace(events=index, **changes)

    def record(self, run: LaneRun, complete: RunComplete | None = None) -> None:
        """Adds a changed run to the transition."""
        before = self.changes.get(run.run_id)
        if before is None:
            self.changes[run.run_id] = RunChange(run, None, complete)
        else:
            self.changes[run.run_id] = RunChange(run, before.request, complete, before.edit)

    def note(self, run: LaneRun, edited: RunEdit) -> None:
        """Adds what a store writes of an update of a changed run."""
        change = self.changes[run.run_id]
        self.changes[run.run_id] = change._replace(edit=edited)

    def replace(self, run: LaneRun) -> None:
        """Puts a changed run where it is in the lane."""
        if self.active is not None and self.active.run_id == run.run_id:
            self.active = run
        self.waiting = tuple(run if one.run_id == run.run_id else one for one in self.waiting)
        self.record(run)

    def open_turn(self, run: LaneRun) -> int:
        """Gives the run the next turn of the transcript, and writes its prompt there."""
        turn = self.turn = self.turn + 1
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

    def write(
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

    def remove(self, runs: Iterable[LaneRun]) -> None:
        """Removes runs from those that wait."""
        gone = {run.run_id for run in runs}
        self.waiting = tuple(run for run in self.waiting if run.run_id not in gone)

    def latest(self, run: LaneRun) -> LaneRun:
        """The waiting run as changed so far."""
        return next(held for held in self.waiting if held.run_id == run.run_id)

    def put_back(self, back: list[LaneRun]) -> None:
        """Puts runs before those that wait, in this order."""
        self.insert(0, back)

    def insert(self, index: int, runs: list[LaneRun]) -> None:
        """Puts runs into the queue at an index, in this order.

        The ranks of the others stay, unless there is no room between them.
        """
        before, after = self.waiting[:index], self.waiting[index:]
        ranks = _ranks_between(before, after, len(runs), most=self.accept_seq)
        if ranks is None:
            placed = (*before, *runs, *after)
            spread = range(FIRST_RANK, FIRST_RANK + len(placed) * RANK_STEP, RANK_STEP)
            self.waiting = tuple(
                [r._replace(rank=rank) for r, rank in zip(placed, spread, strict=True)]
            )
            changed = self.waiting
        else:
            changed = tuple([r._replace(rank=rank) for r, rank in zip(runs, ranks, strict=True)])
            self.waiting = (*before, *changed, *after)
        for run in changed:
            self.record(run)

    def _set_waiting_states(self) -> None:
        """ACCEPTED for the head of a lane without an active run, QUEUED for all others."""
        for n, run in enumerate(self.waiting):
            first = n == 0 and self.active is None
            if first and run.state is RunState.QUEUED:
                self._move(n, advance(run, Trigger.ADVANCE))
            elif not first and run.state is RunState.ACCEPTED:
                self._move(n, advance(run, Trigger.WAIT))

    def _move(self, n: int, run: LaneRun) -> None:
        self.waiting = (*self.waiting[:n], run, *self.waiting[n + 1 :])
        self.record(run)


def _ranks_between(
    before: tuple[LaneRun, ...], after: tuple[LaneRun, ...], count: int, *, most: int
) -> range | None:
    """Ranks for runs between others, none above `most`; None if there is no room."""
    if not after:
        start = before[-1].rank + RANK_STEP if before else FIRST_RANK
        start = min(start, most - (count - 1) * RANK_STEP)
        if before and start <= before[-1].rank:
            return None
        return range(start, start + count * RANK_STEP, RANK_STEP)
    high = after[0].rank
    if not before:
        return range(high - count * RANK_STEP, high, RANK_STEP)
    low = before[-1].rank
    step = (high - low) // (count + 1)
    return range(low + step, low + step * (count + 1), step) if step else None


def _message_id(run_id: str, ordinal: int) -> str:
    """Unique because run ids are: the part before the last dash is the run id."""
    return f"{run_id}-m{ordinal}"
