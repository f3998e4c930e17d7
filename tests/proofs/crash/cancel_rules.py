"""Checks cancels: receipts are true and complete, and no other run was touched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from proofs.crash.history import CancelCall, History, Outcome, Rule
from runlane import Folded, Run, RunEvent, RunState, Started, WhenBusy

INTERRUPTED_BY = "interrupted by "


def _untrue(history: History) -> Iterator[str]:
    """Each run that a receipt names ends cancelled, and by that cancel (R20)."""
    for cancel in history.cancels:
        for receipt in cancel.receipts:
            for covered in receipt.cancelled:
                run = history.final.runs.get(covered.run_id)
                name = f"{covered.run_id}, covered by {cancel.reason}"
                if run is None:
                    yield f"{name}, is no run"
                    continue
                if run.state is not RunState.CANCELLED:
                    yield f"{name}, ended {run.state}"
                elif _reason(run) != cancel.reason:
                    yield f"{name}, says that it was cancelled by {_reason(run)!r}"
                if covered.accept_seq > receipt.fence_accept_seq:
                    yield f"{name}, is above the fence of its receipt"
                if covered.accept_seq and covered.accept_seq != run.accept_seq:
                    yield f"{name}, has another accept_seq in the receipt"


def _touched(history: History) -> Iterator[str]:
    """A cancelled run was covered: by a receipt that names it, by a cancel whose answer was
    lost, or by a run that interrupted it (R11)."""
    by_reason = {cancel.reason: cancel for cancel in history.cancels}
    sent = history.first_sent
    for run in history.final.runs.values():
        if run.state is not RunState.CANCELLED:
            continue
        reason = _reason(run)
        if reason.startswith(INTERRUPTED_BY):
            yield from _interrupted(history, run, reason.removeprefix(INTERRUPTED_BY))
            continue
        cancel = by_reason.get(reason)
        if cancel is None:
            yield f"{run.run_id} was cancelled by {reason!r}, which nobody sent"
        elif cancel.outcome is Outcome.REFUSED:
            yield f"{run.run_id} was cancelled by {reason}, which was refused"
        elif not _means(cancel, run, history):
            yield f"{run.run_id} was cancelled by {reason}, which did not mean it"
        elif cancel.outcome is Outcome.OK and run.run_id not in _named(cancel):
            yield f"{run.run_id} was cancelled by {reason}, whose receipt does not name it"
        elif cancel.outcome is Outcome.OK and sent.get(run.run_id, 0) > cancel.done:
            yield f"{run.run_id} was sent after {reason} was answered, and cancelled by it"


def _interrupted(history: History, run: Run, by: str) -> Iterator[str]:
    other = history.final.runs.get(by)
    if other is None or other.when_busy is not WhenBusy.INTERRUPT:
        yield f"{run.run_id} was interrupted by {by}, which is no run that interrupts"
    elif other.session_id != run.session_id or other.accept_seq < run.accept_seq:
        yield f"{run.run_id} was interrupted by {by}, which did not come after it"
    elif run.attempt == 0 and run.folded_into is None:
        yield f"{run.run_id} was interrupted by {by} while it waited"


def _missed(history: History) -> Iterator[str]:
    """A receipt names every run that was accepted before it and not terminal after it (R10)."""
    answered = _first_answered(history)
    runs_of: defaultdict[str, list[Run]] = defaultdict(list)
    for run in history.final.runs.values():
        runs_of[run.session_id].append(run)
    for cancel in history.cancels:
        if cancel.outcome is not Outcome.OK:
            continue
        candidates = (
            runs_of[cancel.session_id]
            if cancel.session_id
            else [run for runs in runs_of.values() for run in runs]
        )
        fence = _fence(cancel)
        for run in candidates:
            accepted = answered.get(run.run_id, cancel.sent) < cancel.sent
            accepted = accepted or run.accept_seq <= fence
            events = history.final.events.get(run.run_id, [])
            if (
                accepted
                and run.run_id not in _named(cancel)
                and run.state is not RunState.CANCELLED
                and _means(cancel, run, history)
                and _was_open(cancel, run, events)
            ):
                yield f"{run.run_id} was not covered by {cancel.reason}, and went on after it"


def _was_open(cancel: CancelCall, run: Run, events: list[RunEvent]) -> bool:
    """Whether a run certainly was in the scope of an acknowledged cancel."""
    after = cancel.answered_at
    if run.ended_at is None or run.ended_at <= after:
        return False
    begun = [event.time for event in events if isinstance(event.body, Started | Folded)]
    if cancel.scope == "waiting":
        return not begun or begun[0] > after
    # The instant at which a cancel took effect is unknown, and so is the run active then.
    return cancel.scope != "active"


def _means(cancel: CancelCall, run: Run, history: History) -> bool:
    """Whether a run may have been in the scope of a cancel."""
    if cancel.scope == "all":
        return True
    if cancel.scope == "run":
        host = history.final.runs.get(cancel.run_id)
        joined = host is not None and run.folded_into == host.run_id
        return run.run_id == cancel.run_id or joined
    return run.session_id == cancel.session_id


def _fence(cancel: CancelCall) -> int:
    if cancel.scope == "all" or not cancel.receipts:
        return 0
    return cancel.receipts[0].fence_accept_seq


def _named(cancel: CancelCall) -> set[str]:
    return {covered.run_id for receipt in cancel.receipts for covered in receipt.cancelled}


def _reason(run: Run) -> str:
    return "" if run.run_complete is None else run.run_complete.cancel_reason


def _first_answered(history: History) -> dict[str, int]:
    return {
        run_id: min(attempt.done for attempt in tries)
        for run_id, tries in history.acknowledged.items()
    }


RULES: Mapping[str, Rule] = {
    "receipt untrue": _untrue,
    "cancelled uncovered": _touched,
    "receipt incomplete": _missed,
}
