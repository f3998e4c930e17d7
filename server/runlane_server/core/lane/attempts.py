"""The end of an attempt: it ends its run, or the run is repeated or moved (R19, R35 to R38)."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from runlane_server.core.lane.asking import count
from runlane_server.core.lane.cancelling import cancel_active
from runlane_server.core.lane.edit import Edit, the_active
from runlane_server.core.lane.ending import end_turn
from runlane_server.core.lane.parking import drop_output, park_for_restart, unfold
from runlane_server.core.lane.states import AT_WORK, Trigger, advance
from runlane_server.core.model import (
    EventBody,
    FinishReason,
    Micros,
    Role,
    RunComplete,
    RunError,
    RunState,
)
from runlane_server.core.transition import Lane, LaneRun, Outcome, RunChange, Transition
from runlane_server.core.turn import DraftMessage

NODE_LOST = "the node that ran it was lost"
SHUT_DOWN = "the node that ran it was shut down"
"""Messages of runs that end INTERRUPTED."""


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
    active = _supervised(lane, run_id, attempt, host)
    edit = Edit(lane, at)
    content, tail = _own_output(active, outcome.content, outcome.tail)
    outcome = replace(outcome, content=content, tail=tail)
    count(edit, active, events)
    if cancelled is not None:
        cancel_active(edit, cancelled)
    elif (backoff := _backoff(active, outcome)) is not None:
        _retry(edit, outcome.content, outcome.tail, failed=True, not_before=at + backoff)
        return edit.done(reply=None)
    return edit.done(reply=end_turn(edit, outcome))


def _supervised(lane: Lane, run_id: str, attempt: int, host: str | None) -> LaneRun:
    """The active run, for the supervisor of its attempt on node `host` to end it.

    A run that is about to end has no node if its agent leaves in the same instant. Then that
    supervisor ends it, wherever it is.
    """
    active = lane.active
    if active is not None and active.asking.parked and _is_ending(active):
        host = None
    return the_active(lane, run_id, attempt, host)


def _is_ending(active: LaneRun) -> bool:
    return active.state is RunState.CANCELLING or bool(active.asking.expired)


def _own_output(
    active: LaneRun, content: tuple[DraftMessage, ...], tail: tuple[EventBody, ...]
) -> tuple[tuple[DraftMessage, ...], tuple[EventBody, ...]]:
    """The output of an attempt, as far as it may still be written."""
    if active.asking.restarts and any(draft.run_id for draft in content):
        # Of the runs folded into it, some wait again, and the prompts of the others were written
        # when it parked.
        return (), ()
    return content, tail


def _backoff(active: LaneRun, outcome: Outcome) -> Micros | None:
    """The time until the next attempt if the policy of the run asks for one."""
    policy, error = active.retry, outcome.error
    if policy is None or error is None or outcome.is_final or active.state not in AT_WORK:
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
    lost_with: str | None = None,
) -> Transition[bool]:
    """Retries a run whose node was lost, or ends it INTERRUPTED.

    A run that waits for input keeps its attempt if its agent can resume (R44). `content` and
    `events` are the stored messages, and the number of events, of the attempt. A confirmed cancel
    stays in force. Replies with whether the attempt was still active, and on the node `lost_with`
    if one is given: another node may have recovered or adopted it already.
    """
    active = lane.active
    if active is None or (active.run_id, active.attempt) != (run_id, attempt):
        return Transition(lane, reply=False)
    if lost_with not in {None, active.host}:
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
    active = _supervised(lane, run_id, attempt, host)
    content, tail = outcome.content, outcome.tail
    is_active = active.state is RunState.ACTIVE
    if is_unused and is_active and not (content or tail or lane.folded):
        edit = Edit(lane, at)
        # It keeps its number: what is repeated for it must not reach the next one (R33).
        extra = active.asking.extra_attempts + 1
        asking = active.asking._replace(extra_attempts=extra)
        count(edit, active._replace(asking=asking), events)
        _retry(edit, ())
        return edit.done(reply=True)
    return _give_up(lane, active, content, tail, at=at, events=events, why=why)


def adopt(
    lane: Lane, run_id: str, attempt: int, *, host: str, lost_with: str | None = None
) -> Transition[LaneRun]:
    """Moves the active run to node `host`, where its executor is connected now (R36).

    The attempt continues, and a confirmed cancel stays in force. A run that waits for input has no
    executor, and stays where it is; so does one that is not on the node `lost_with` any more, if
    one is given: its executor has connected to another node meanwhile. Replies with the run. Raises
    IllegalCommand if the attempt is not the active one.
    """
    active = the_active(lane, run_id, attempt)
    if active.host == host or active.state is RunState.INPUT_REQUIRED:
        return Transition(lane, reply=active)
    if lost_with not in {None, active.host}:
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
    edit = Edit(lane, at)
    waits = active.state is RunState.INPUT_REQUIRED and not active.asking.expired
    if waits and active.asking.parked:
        return edit.done(reply=False)
    count(edit, active, events)
    content, tail = _own_output(active, content, tail)
    # Attempts that the agent failed are limited by the retry policy; others do not count.
    counted = active.attempt - active.failures - active.asking.extra_attempts
    if waits and active.asking.resumable:
        park_for_restart(edit, content)
    elif (waits or active.state is RunState.ACTIVE) and counted < active.max_attempts:
        _retry(edit, content)
    else:
        error = RunError("INTERRUPTED", why)
        end_turn(edit, Outcome(FinishReason.INTERRUPTED, error, content, tail))
    return edit.done(reply=True)


def _retry(
    edit: Edit,
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
    active = cast("LaneRun", edit.active)
    drop_output(edit, active, content)
    kept = active.asking._replace(parked=False, restarts=False, used=0, checkpoint="")
    edit.active = None
    back = advance(
        edit.emit(active, *tail),
        Trigger.RETRY,
        host="",
        asking=kept,
        failures=active.failures + failed,
        not_before=not_before,
    )
    edit.put_back([back, *unfold(edit)])
