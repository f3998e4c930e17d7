"""How runs end, and what is written then (R14, R16, R21, R22); and how a session ends."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from typing import NamedTuple, cast

from runlane_server.core.errors import SessionBusy, SessionNotFound
from runlane_server.core.lane.asking import end_inputs
from runlane_server.core.lane.edit import Edit
from runlane_server.core.lane.states import Trigger, advance, next_state
from runlane_server.core.model import (
    MAX_COMPLETE_TEXT_BYTES,
    NO_USAGE,
    FinishReason,
    Micros,
    RunComplete,
    RunError,
    RunState,
    Usage,
    cut_utf8,
)
from runlane_server.core.transition import Lane, LaneRun, Outcome, Transition
from runlane_server.core.turn import close, final_text, with_result

INPUT_EXPIRED = "INPUT_EXPIRED"
"""Reason of a run that failed because nobody answered in time."""


def fail_waiting(
    lane: Lane, error: RunError, *, at: Micros, agents: Container[str] | None = None
) -> Transition[int]:
    """Ends the waiting runs as failed before they started (R30): those of the named agents only, if
    there are names (R32). Replies with their number."""
    edit = Edit(lane, at)
    failed = [run for run in lane.waiting if agents is None or run.agent in agents]
    for run in failed:
        end_unstarted(edit, run, Trigger.FAIL, FinishReason.ERROR, error)
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


def end_turn(edit: Edit, outcome: Outcome) -> RunComplete:
    """Ends the active run and those folded into it, and writes the turn (R16, R19, R22)."""
    active = cast("LaneRun", edit.active)
    if active.asking.expired:
        expired = RunError(INPUT_EXPIRED, "nobody answered an input request in time")
        outcome = replace(outcome, finish_reason=FinishReason.ERROR, error=expired)
    trigger = Trigger.COMPLETE if outcome.error is None else Trigger.FAIL
    state = next_state(active.state, trigger)
    ended = edit.emit(active, *outcome.tail, state=state)
    cancelled = ended.state is RunState.CANCELLED
    reason = FinishReason.CANCELED if cancelled else outcome.finish_reason
    error = None if cancelled else outcome.error
    content = close(outcome.content, reason)
    result = outcome.result if ended.state is RunState.COMPLETED else ""
    written = with_result(content, result)
    # The ordinals of an attempt that does not go on are taken.
    attempt = ended.attempt + ended.asking.restarts
    message_id = edit.write(ended, written, outcome.model, attempt=attempt)
    shared = _End(reason, error, message_id, final_text(content), result)
    complete = end_run(edit, ended, reason, error, shared, usage=outcome.usage)
    for run in edit.folded:
        end_run(edit, advance(run, trigger), reason, error, shared)
    edit.active, edit.folded = None, ()
    return complete


def end_unstarted(
    edit: Edit,
    run: LaneRun,
    trigger: Trigger,
    reason: FinishReason,
    error: RunError | None,
) -> None:
    """Ends a waiting run without its agent, and writes its turn (R14)."""
    edit.remove([run])
    run = advance(run, trigger, turn=run.turn or edit.open_turn(run))
    message_id = edit.write(run, close((), reason), "", attempt=run.attempt + 1)
    end_run(edit, run, reason, error, _End(reason, error, message_id, ""))


def end_run(
    edit: Edit,
    run: LaneRun,
    reason: FinishReason,
    error: RunError | None,
    turn: _End | None = None,
    *,
    usage: Usage = NO_USAGE,
) -> RunComplete:
    """Ends one run with its RunComplete (R21, R23)."""
    run = end_inputs(edit, run)
    text, truncated = cut_utf8(turn.text if turn else "", MAX_COMPLETE_TEXT_BYTES)
    complete = RunComplete(
        session_id=edit.key.session_id,
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
        ended_at=edit.at,
        result=turn.result if turn else "",
    )
    edit.record(edit.emit(run, complete), complete)
    return complete


class _End(NamedTuple):
    """The end of a turn, shared by the active run and the runs folded into it."""

    finish_reason: FinishReason
    error: RunError | None
    message_id: str
    text: str
    result: str = ""
