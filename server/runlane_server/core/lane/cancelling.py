"""Cancels: which runs a cancel covers, and what it does to each (R10 to R20)."""

from __future__ import annotations

from collections.abc import Container, Iterable

from runlane_server.core.lane.asking import withdraw_inputs
from runlane_server.core.lane.edit import Edit
from runlane_server.core.lane.ending import end_run, end_unstarted
from runlane_server.core.lane.states import Trigger, advance
from runlane_server.core.model import CancelScope, FinishReason, Micros, RunState
from runlane_server.core.transition import CoveredRun, Lane, LaneRun, Receipt, Transition


def cancel(
    lane: Lane, scope: CancelScope, *, at: Micros, run_id: str = "", reason: str = ""
) -> Transition[Receipt]:
    """Covers the accepted runs that have not ended (R10 to R16). Replies with the receipt (R20).

    If there is nothing to cover, nothing changes (R12, R13). `run_id` is for scope RUN; a run that
    is not in the lane has ended and is not covered. A run that waits for its next attempt counts as
    the active one (R38).
    """
    edit = Edit(lane, at)
    before = {run.run_id: run for run in lane.runs}
    if scope is CancelScope.RUN:
        _cancel_run(edit, run_id, reason)
    if scope in {CancelScope.SESSION, CancelScope.ACTIVE}:
        cancel_active(edit, reason)
    if scope in {CancelScope.SESSION, CancelScope.WAITING}:
        cancel_waiting(edit, lane.queue, reason)
    covered = [
        CoveredRun(run_id, before[run_id].accept_seq, before[run_id].state)
        for run_id in edit.covered
    ]
    covered.sort(key=lambda run: run.accept_seq)
    if scope is not CancelScope.ACTIVE:
        only = run_id if scope is CancelScope.RUN else None
        covered += _cover_reservations(edit, only, reason, known=before)
    return edit.done(reply=Receipt(lane.key.session_id, tuple(covered), lane.accept_seq))


def cancel_active(edit: Edit, reason: str) -> None:
    """Covers the active run and those folded into it. It stays active until it returns (R9)."""
    active = edit.active
    if active is None:
        _cancel_backing_off(edit, reason)
        return
    if active.state is RunState.CANCELLING:
        return
    edit.active = _cover(edit, active, reason)
    edit.folded = tuple(_cover(edit, run, reason) for run in edit.folded)


def _cancel_backing_off(edit: Edit, reason: str) -> None:
    """Covers the run that waits for its next attempt; its prompt is written already (R38)."""
    cancel_waiting(edit, [run for run in edit.waiting[:1] if run.not_before], reason)


def cancel_waiting(edit: Edit, runs: Iterable[LaneRun], reason: str) -> None:
    """Ends waiting runs as cancelled on entry, and writes their turns (R14)."""
    for run in runs:
        edit.covered.append(run.run_id)
        end_unstarted(
            edit,
            edit.latest(run)._replace(cancel_reason=reason),
            Trigger.CANCEL,
            FinishReason.CANCELED,
            None,
        )


def _cancel_run(edit: Edit, run_id: str, reason: str) -> None:
    """Covers one run, wherever it is."""
    if edit.active is not None and edit.active.run_id == run_id:
        cancel_active(edit, reason)
    cancel_waiting(edit, [run for run in edit.waiting if run.run_id == run_id], reason)
    for run in edit.folded:
        if run.run_id == run_id and run.state is RunState.FOLDED:
            _withdraw(edit, run, reason)


def _cover_reservations(
    edit: Edit, only: str | None, reason: str, known: Container[str]
) -> list[CoveredRun]:
    """Marks reservations, so that their runs will be cancelled on entry (R10).

    A reservation that repeats the accept of a `known` run is skipped, and each run is listed
    once.
    """
    meant = [
        held
        for held in edit.reservations
        if only in {None, held.run_id} and held.run_id not in known and not held.covered
    ]
    edit.reservations = tuple(
        held._replace(covered=True, cancel_reason=reason) if held in meant else held
        for held in edit.reservations
    )
    run_ids = dict.fromkeys(held.run_id for held in meant)
    return [CoveredRun(run_id, 0, RunState.ACCEPTED) for run_id in run_ids]


def _cover(edit: Edit, run: LaneRun, reason: str) -> LaneRun:
    edit.covered.append(run.run_id)
    run = advance(withdraw_inputs(edit, run), Trigger.CANCEL, cancel_reason=reason)
    edit.record(run)
    return run


def _withdraw(edit: Edit, run: LaneRun, reason: str) -> None:
    """Ends a folded run alone. Its prompt stays in the turn, which continues."""
    edit.covered.append(run.run_id)
    edit.folded = tuple(other for other in edit.folded if other.run_id != run.run_id)
    run = advance(run, Trigger.WITHDRAW, cancel_reason=reason)
    end_run(edit, run, FinishReason.CANCELED, None)
