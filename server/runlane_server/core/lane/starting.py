"""How a waiting run starts, or joins the turn of the active one (R7, R8, R26)."""

from __future__ import annotations

from typing import cast

from runlane_server.core.lane.asking import count
from runlane_server.core.lane.edit import Edit, the_active
from runlane_server.core.lane.states import Trigger, advance, next_state
from runlane_server.core.model import Folded, Micros, RunState, Started, WhenBusy
from runlane_server.core.transition import Lane, LaneRun, Transition


def dispatch(lane: Lane, *, at: Micros, host: str = "") -> Transition[LaneRun | None]:
    """Starts the first waiting run on node `host` if no run is active (R7, R8).

    Replies with the run, or None if there is nothing to start: a run that waits for its next
    attempt keeps its place, and nothing overtakes it (R38).
    """
    edit = Edit(lane, at)
    return edit.done(reply=_start(edit, host) if lane.can_start_at(at) else None)


def drain_for_step(
    lane: Lane, run_id: str, attempt: int, *, at: Micros, events: int, host: str | None = None
) -> Transition[tuple[LaneRun, ...]]:
    """Folds the waiting FOLD runs of its agent into the active turn, in accept order (R26, R27).

    `events` is the number of events of the active run so far. Replies with the folded runs; none
    if the active run was cancelled. Raises IllegalCommand if the attempt is not the active one, or
    not active on node `host`.
    """
    active = the_active(lane, run_id, attempt, host)
    edit = Edit(lane, at)
    # Its supervisor counts the folded runs; an event of input would be one more.
    count(edit, active, events, with_late=False)
    folded = _fold(edit) if active.state is RunState.ACTIVE else ()
    return edit.done(reply=folded)


def _start(edit: Edit, host: str) -> LaneRun:
    """Makes the first waiting run active. Only its first attempt writes the prompt."""
    head, edit.waiting = edit.waiting[0], edit.waiting[1:]
    attempt = head.attempt + 1
    run = edit.active = edit.emit(
        head,
        Started(attempt),
        state=next_state(head.state, Trigger.START),
        attempt=attempt,
        turn=head.turn or edit.open_turn(head),
        started_at=edit.at,
        host=host,
        not_before=0,
    )
    edit.record(run)
    return run


def _fold(edit: Edit) -> tuple[LaneRun, ...]:
    """Folds the waiting FOLD runs of the same agent into the active turn.

    A run that has already been attempted has a turn of its own and is not folded.
    """
    host = cast("LaneRun", edit.active)
    waiting_to = (run for run in edit.waiting if run.when_busy is WhenBusy.FOLD)
    joining = [run for run in waiting_to if run.turn == 0 and run.agent == host.agent]
    edit.remove(joining)
    folded: list[LaneRun] = []
    for waiting in sorted(joining, key=lambda run: run.accept_seq):
        event = Folded(waiting.run_id, host.run_id)
        run = advance(waiting, Trigger.FOLD, folded_into=host.run_id, turn=host.turn)
        run = edit.emit(run, event)
        host = edit.emit(host, event)
        folded.append(run)
        edit.record(run)
    if folded:
        edit.record(host)
        edit.active = host
        edit.folded = (*edit.folded, *folded)
    return tuple(folded)
