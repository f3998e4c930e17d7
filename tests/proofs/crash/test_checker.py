"""The checker finds violations: each history here could come from a broken server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from proofs.crash.checker import check
from proofs.crash.history import (
    AcceptCall,
    CancelCall,
    FollowerRecord,
    History,
    Outcome,
    Replay,
    SubscriberRecord,
)
from runlane import (
    Accepted,
    CancelledRun,
    CancelReceipt,
    FinishReason,
    Message,
    Role,
    Run,
    RunComplete,
    RunEvent,
    RunState,
    Started,
    Text,
    TextDelta,
    WhenBusy,
)

T0 = datetime(2026, 1, 1, tzinfo=UTC)
BY = "the cancel"


def at(second: float) -> datetime:
    return T0 + timedelta(seconds=second)


def ended(run_id: str, seq: int, *, cancelled: bool = False) -> Run:
    """Run number `seq`: accepted at that number, and cancelled while it waited, or run later."""
    state = RunState.CANCELLED if cancelled else RunState.COMPLETED
    begun = None if cancelled else at(10 * seq)
    complete = RunComplete(
        session_id="s",
        run_id=run_id,
        accept_seq=seq,
        state=state,
        cancelled=cancelled,
        finish_reason=FinishReason.CANCELED if cancelled else FinishReason.STOP,
        error=None,
        message_id=f"{run_id}-m1",
        text="" if cancelled else run_id,
        text_truncated=False,
        folded_into=None,
        usage=None,
        attempt=0 if cancelled else 1,
        cancel_reason=BY if cancelled else "",
        accepted_at=at(seq),
        started_at=begun,
        ended_at=at(10 * seq + 1),
    )
    return Run(
        session_id="s",
        run_id=run_id,
        accept_seq=seq,
        state=state,
        when_busy=WhenBusy.QUEUE,
        prompt_excerpt="x",
        accepted_at=at(seq),
        attempt=complete.attempt,
        started_at=begun,
        ended_at=complete.ended_at,
        run_complete=complete,
    )


def events_of(run: Run) -> list[RunEvent]:
    assert run.run_complete is not None
    events = [RunEvent(1, run.accepted_at, Accepted(run.accept_seq))]
    if run.started_at is not None:
        events.append(RunEvent(2, run.started_at, Started(1)))
        events.append(RunEvent(3, run.started_at, TextDelta(run.run_id)))
    end = run.run_complete
    return [*events, RunEvent(len(events) + 1, end.ended_at, end)]


def messages_of(run: Run) -> list[Message]:
    end = run.run_complete
    assert end is not None
    prompt = Message(
        f"{run.run_id}-m0", run.run_id, run.accept_seq, Role.USER, (Text("x"),), None, "", T0
    )
    answer = replace(
        prompt,
        message_id=end.message_id or "",
        role=Role.ASSISTANT,
        parts=(Text(end.text),),
        finish_reason=end.finish_reason,
    )
    return [prompt, answer]


def accepted(run: Run, sent: int) -> AcceptCall:
    return AcceptCall(
        "s", run.run_id, run.when_busy, 1, sent, sent + 1, Outcome.OK, run=run, cursor="c"
    )


def sound() -> History:
    """A sound history of four runs, one cancelled while it waited, with three subscribers."""
    runs = [ended("a", 1), ended("b", 2), ended("c", 3, cancelled=True), ended("last", 4)]
    history = History()
    history.accepts = [accepted(run, 10 * n) for n, run in enumerate(runs[:3], start=1)]
    history.accepts.append(replace(history.accepts[0], sent=35, done=36))
    gone = replace(accepted(ended("gone", 9), 36), outcome=Outcome.UNKNOWN, run=None)
    history.accepts += [gone, replace(gone, run_id="full", outcome=Outcome.REFUSED)]
    covered = CancelledRun("s", "c", 3, RunState.QUEUED)
    history.cancels = [
        CancelCall(
            *("waiting", "s", "", BY, 40, 41, at(15), Outcome.OK),
            receipts=(CancelReceipt("s", (covered,), 3),),
        )
    ]
    final = history.final
    # b was waiting when the cancel was answered, so it was started before that.
    final.runs = {run.run_id: run for run in runs}
    final.runs["b"] = history.accepts[1].run or runs[1]
    final.listed = list(final.runs.values())[::-1]
    final.log = [run.run_complete for run in final.runs.values() if run.run_complete]
    final.events = {run_id: events_of(run) for run_id, run in final.runs.items()}
    final.messages["s"] = [m for run in final.runs.values() for m in messages_of(run)]
    final.sentinels = {"last"}
    final.replays = [Replay("b", final.log[2:])]
    history.cancels[0] = replace(history.cancels[0], answered_at=at(25))
    history.subscribers = [
        SubscriberRecord("all", from_beginning=True, events=list(final.log)),
        SubscriberRecord("from b", "s", after_accept_of="b", events=final.log[1:]),
        SubscriberRecord("from now", established=15, events=final.log[1:]),
    ]
    history.followers = [FollowerRecord("a", events=list(final.events["a"]))]
    history.reads = [runs[0]]
    return history


def test_a_sound_history_has_no_violation() -> None:
    assert check(sound()) == []


# --- Doctored histories -----------------------------------------------------------------


def lost_run(history: History) -> None:
    """An acknowledged run does not exist."""
    final = history.final
    del final.runs["b"], final.events["b"]
    final.listed = [run for run in final.listed if run.run_id != "b"]
    final.log = [each for each in final.log if each.run_id != "b"]
    final.messages["s"] = [m for m in final.messages["s"] if m.run_id != "b"]
    final.replays.clear()
    for one in history.subscribers:
        one.events = [each for each in one.events if each.run_id != "b"]


def lost_in_list(history: History) -> None:
    del history.final.listed[1]


def refused_run_is_there(history: History) -> None:
    history.accepts[1] = replace(history.accepts[1], outcome=Outcome.REFUSED, run=None)


def never_ended(history: History) -> None:
    run = replace(history.final.runs["a"], state=RunState.ACTIVE)
    history.final.runs["a"] = run
    history.final.listed[-1] = run


def retry_gave_another_run(history: History) -> None:
    run = history.accepts[3].run
    assert run is not None
    history.accepts[3] = replace(history.accepts[3], run=replace(run, accept_seq=7))


def conflict(history: History) -> None:
    history.accepts[3] = replace(
        history.accepts[3], outcome=Outcome.REFUSED, error="RUN_ID_CONFLICT", run=None
    )


def defect(history: History) -> None:
    history.cancels.append(replace(history.cancels[0], reason="z", error="INTERNAL", receipts=()))
    history.cancels[-1] = replace(history.cancels[-1], outcome=Outcome.UNKNOWN)


def seq_against_acknowledgement(history: History) -> None:
    """a was sent after the acknowledgement of b, but precedes it."""
    history.accepts[0] = replace(history.accepts[0], sent=33, done=34)
    history.subscribers.pop()


def same_seq(history: History) -> None:
    for n, run in enumerate(history.final.listed):
        if run.run_id == "last":
            changed = replace(run, accept_seq=3)
            history.final.listed[n] = history.final.runs["last"] = changed


def started_too_often(history: History) -> None:
    _change_run(history, "a", attempt=2)


def event_lost(history: History) -> None:
    """One subscriber did not get one event."""
    del history.subscribers[1].events[1]


def event_lost_to_all(history: History) -> None:
    history.final.replays.clear()
    for events in (history.final.log, *(one.events for one in history.subscribers)):
        events[:] = [each for each in events if each.run_id != "b"]


def event_of_no_run(history: History) -> None:
    ghost = replace(history.final.log[0], run_id="ghost")
    history.final.log.insert(0, ghost)
    history.subscribers[0].events.insert(0, ghost)


def event_twice(history: History) -> None:
    history.subscribers[0].events.insert(2, history.subscribers[0].events[1])


def order_swapped(history: History) -> None:
    events = history.subscribers[0].events
    events[0], events[1] = events[1], events[0]


def began_too_late(history: History) -> None:
    del history.subscribers[1].events[0]


def now_began_too_late(history: History) -> None:
    del history.subscribers[2].events[0]


def other_content(history: History) -> None:
    history.subscribers[0].events[0] = replace(
        history.subscribers[0].events[0], text="something else"
    )


def replay_skipped(history: History) -> None:
    history.final.replays = [Replay("a", history.final.log[2:])]


def index_missing(history: History) -> None:
    del history.followers[0].events[1]


def other_event(history: History) -> None:
    history.followers[0].events[2] = replace(history.followers[0].events[2], body=TextDelta("no"))


def two_ends(history: History) -> None:
    events = history.final.events["b"]
    events.append(replace(events[-1], index=len(events) + 1))


def overlap(history: History) -> None:
    """last was started while b was active."""
    events = history.final.events["last"]
    events[1] = replace(events[1], time=at(20.5))
    events[2] = replace(events[2], time=at(20.5))


def out_of_turn(history: History) -> None:
    """last was started before a, which was accepted before it."""
    events = history.final.events["last"]
    history.final.events["last"] = [replace(event, time=at(5)) for event in events]


def receipt_untrue(history: History) -> None:
    """A run that a receipt names ran on."""
    receipt = history.cancels[0].receipts[0]
    named = CancelledRun("s", "b", 2, RunState.QUEUED)
    history.cancels[0] = replace(
        history.cancels[0],
        receipts=(replace(receipt, cancelled=(named, *receipt.cancelled)),),
    )


def receipt_names_no_run(history: History) -> None:
    receipt = history.cancels[0].receipts[0]
    named = CancelledRun("s", "gone", 0, RunState.ACCEPTED)
    history.cancels[0] = replace(
        history.cancels[0],
        receipts=(replace(receipt, cancelled=(*receipt.cancelled, named)),),
    )


def cancelled_without_receipt(history: History) -> None:
    history.cancels[0] = replace(history.cancels[0], receipts=(CancelReceipt("s", (), 3),))


def cancelled_by_nobody(history: History) -> None:
    history.cancels.clear()


def cancelled_after_the_answer(history: History) -> None:
    """The cancelled run c was sent after the acknowledgement of the cancel."""
    history.accepts[2] = replace(history.accepts[2], sent=50, done=51)


def receipt_incomplete(history: History) -> None:
    """The receipt omits b, which still waited after the cancel."""
    history.cancels[0] = replace(history.cancels[0], answered_at=at(19))


def prompt_twice(history: History) -> None:
    messages = history.final.messages["s"]
    messages.insert(1, replace(messages[0], message_id="a-m7"))


def message_twice(history: History) -> None:
    history.final.messages["s"].insert(2, history.final.messages["s"][1])


def other_text(history: History) -> None:
    messages = history.final.messages["s"]
    messages[1] = replace(messages[1], parts=(Text("no"),))


def streamed_otherwise(history: History) -> None:
    events = history.final.events["b"]
    events[2] = replace(events[2], body=TextDelta("no"))


def ended_otherwise(history: History) -> None:
    end = replace(history.final.log[0], state=RunState.FAILED)
    history.reads = [replace(history.reads[0], state=RunState.FAILED, run_complete=end)]


def _change_run(history: History, run_id: str, **changes: object) -> None:
    run = replace(history.final.runs[run_id], **changes)  # type: ignore[arg-type]
    history.final.runs[run_id] = run
    history.final.listed = [run if each.run_id == run_id else each for each in history.final.listed]


@pytest.mark.parametrize(
    ("doctor", "rules"),
    [
        (lost_run, {"lost"}),
        (lost_in_list, {"lost", "inconsistent"}),
        (refused_run_is_there, {"ghost"}),
        (never_ended, {"inconsistent"}),
        (retry_gave_another_run, {"retry"}),
        (conflict, {"retry"}),
        (defect, {"defect"}),
        (seq_against_acknowledgement, {"seq"}),
        (same_seq, {"seq", "receipt incomplete"}),
        (started_too_often, {"attempts"}),
        (event_lost, {"heard"}),
        (event_lost_to_all, {"event missing"}),
        (event_of_no_run, {"event missing"}),
        (event_twice, {"event twice"}),
        (order_swapped, {"heard"}),
        (began_too_late, {"heard"}),
        (now_began_too_late, {"heard"}),
        (other_content, {"heard"}),
        (replay_skipped, {"replay"}),
        (index_missing, {"gap"}),
        (other_event, {"gap"}),
        (two_ends, {"gap"}),
        (overlap, {"overlap"}),
        (out_of_turn, {"order"}),
        (receipt_untrue, {"receipt untrue"}),
        (receipt_names_no_run, {"receipt untrue"}),
        (cancelled_without_receipt, {"cancelled uncovered"}),
        (cancelled_by_nobody, {"cancelled uncovered"}),
        (cancelled_after_the_answer, {"cancelled uncovered"}),
        (receipt_incomplete, {"receipt incomplete"}),
        (prompt_twice, {"transcript"}),
        (message_twice, {"message", "streamed"}),
        (other_text, {"transcript", "streamed"}),
        (streamed_otherwise, {"streamed"}),
        (ended_otherwise, {"read"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_doctored_history_has_the_violation(
    doctor: Callable[[History], None], rules: set[str]
) -> None:
    history = sound()
    doctor(history)
    assert {violation.rule for violation in check(history)} == rules
