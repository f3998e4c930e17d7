"""The checker finds violations of several nodes: each history here comes from broken ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from proofs.crash.checker import check
from proofs.crash.faults import GAVE_UP, FaultKind
from proofs.crash.history import AttemptRecord, Fault, History, Replay
from proofs.crash.nodes_rules import near, recoveries
from proofs.crash.test_checker import _change_run, at, sound
from runlane import RunComplete, RunEvent, Started


def work(node: int, run_id: str, attempt: int, begun: float, ended: float | None) -> AttemptRecord:
    return AttemptRecord(
        node, "s", run_id, attempt, at(begun), None if ended is None else at(ended)
    )


def fault(node: int, kind: FaultKind, begun: float, ended: float) -> Fault:
    return Fault(node, kind, at(begun), at(ended))


def shared() -> History:
    """A sound history of three nodes: the node of b was killed, and another took over."""
    history = sound()
    history.lease = 2.0
    _change_run(history, "b", attempt=2, max_attempts=2)
    first, begun, text, end = history.final.events["b"]
    again = RunEvent(3, at(20.6), Started(2))
    history.final.events["b"] = [
        *(first, begun, again),
        replace(text, index=4, time=at(20.7)),
        replace(end, index=5),
    ]
    history.attempts = [
        work(0, "a", 1, 10.01, 10.9),
        work(1, "b", 1, 20.01, None),
        work(2, "b", 2, 20.61, 20.9),
        work(2, "last", 1, 40.01, 40.9),
    ]
    history.faults = [
        fault(0, FaultKind.PAUSE, 2.0, 2.5),
        fault(1, FaultKind.KILL, 20.1, 22.0),
        fault(1, FaultKind.CUT_CLIENTS, 30.0, 31.0),
    ]
    history.final.replays += [Replay("", list(history.final.log)) for _ in range(3)]
    return history


def test_a_sound_history_of_nodes_has_no_violation() -> None:
    history = shared()
    assert check(history) == []
    ((killed, run, seconds),) = recoveries(history)
    assert (killed.node, run.run_id, seconds) == (1, "b", 0.5)


# --- Doctored histories -----------------------------------------------------------------


def begun_twice(history: History) -> None:
    history.attempts.append(work(2, "a", 1, 10.92, 10.95))


def worked_on_in_vain(history: History) -> None:
    """A node executed an attempt whose start was never committed."""
    history.attempts.append(work(2, "a", 2, 10.92, 10.95))


def worked_on_too_early(history: History) -> None:
    history.attempts[0] = work(0, "a", 1, 9.99, 10.9)


def worked_on_a_stranger(history: History) -> None:
    history.attempts.append(work(2, "ghost", 1, 50.0, 50.1))


def attempt_skipped(history: History) -> None:
    events = history.final.events["b"]
    events[2] = replace(events[2], body=Started(3))
    history.attempts[2] = replace(history.attempts[2], attempt=3)
    _change_run(history, "b", attempt=3, max_attempts=3)


def two_runs_at_once(history: History) -> None:
    """The agent of b continued after the end of its run, without a reason."""
    history.attempts[2] = work(2, "b", 2, 20.61, 41.0)


def two_attempts_at_once(history: History) -> None:
    """A node that was cut off let its agent continue although another had taken over."""
    history.faults[1] = fault(1, FaultKind.LONG_CUT_STORE, 20.1, 24.0)
    history.attempts[1] = work(1, "b", 1, 20.01, 20.65)


def awake_too_long(history: History) -> None:
    """A stopped node continued its work long after it was resumed, and lost the output."""
    history.faults[1] = fault(1, FaultKind.LONG_PAUSE, 20.1, 21.0)
    history.attempts[1] = work(1, "b", 1, 20.01, 23.0)


def lost_for_no_reason(history: History) -> None:
    """The node that lost b had no fault."""
    history.faults[1] = fault(0, FaultKind.KILL, 20.1, 22.0)
    history.attempts[1] = work(1, "b", 1, 20.01, 20.1)


def lost_before_the_fault(history: History) -> None:
    history.faults[1] = fault(1, FaultKind.KILL, 20.7, 22.0)
    history.attempts[1] = work(1, "b", 1, 20.01, 20.5)


def left_lying(history: History) -> None:
    """No node took over b for 15 seconds."""
    _end_later(history, "b", 35.5)
    events = history.final.events["b"]
    events[2] = replace(events[2], time=at(35.0))
    events[3] = replace(events[3], time=at(35.1))
    history.attempts[2] = work(2, "b", 2, 35.1, 35.4)


def one_node_skips_an_event(history: History) -> None:
    del history.final.replays[-1].events[1]  # type: ignore[attr-defined]


def _end_later(history: History, run_id: str, second: float) -> None:
    def later(complete: RunComplete) -> RunComplete:
        if complete.run_id != run_id:
            return complete
        return replace(complete, ended_at=at(second))

    final = history.final
    final.log[:] = map(later, final.log)
    for one in history.subscribers:
        one.events[:] = map(later, one.events)
    final.replays[:] = [Replay(r.after, [*map(later, r.events)]) for r in final.replays]
    (end,) = [each for each in final.log if each.run_id == run_id]
    _change_run(history, run_id, ended_at=at(second), run_complete=end)
    events = final.events[run_id]
    events[-1] = replace(events[-1], time=at(second), body=end)


@pytest.mark.parametrize(
    ("doctor", "rules"),
    [
        (begun_twice, {"begun twice"}),
        (worked_on_in_vain, {"unrecorded"}),
        (worked_on_too_early, {"unrecorded"}),
        (worked_on_a_stranger, {"unrecorded"}),
        (attempt_skipped, {"unrecorded"}),
        (two_runs_at_once, {"at once"}),
        (two_attempts_at_once, {"at once"}),
        (awake_too_long, {"at once"}),
        (lost_for_no_reason, {"uncaused"}),
        (lost_before_the_fault, {"uncaused"}),
        (left_lying, {"late"}),
        (one_node_skips_an_event, {"replay"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_doctored_history_has_the_violation(
    doctor: Callable[[History], None], rules: set[str]
) -> None:
    history = shared()
    doctor(history)
    assert {violation.rule for violation in check(history)} == rules


def test_a_stopped_node_may_notice_its_loss_after_it_resumes() -> None:
    history = shared()
    history.faults[1] = fault(1, FaultKind.LONG_PAUSE, 20.1, 21.0)
    history.attempts[1] = work(1, "b", 1, 20.01, 21.2)
    assert check(history) == []
    # This is allowed if the node was stopped again at once.
    history.faults.append(fault(1, FaultKind.LONG_PAUSE, 21.1, 29.0))
    history.attempts[1] = work(1, "b", 1, 20.01, 29.1)
    assert check(history) == []


def test_a_stopped_node_may_start_the_run_it_was_about_to_start() -> None:
    history = shared()
    history.faults[1] = fault(1, FaultKind.LONG_PAUSE, 20.005, 20.8)
    history.attempts[1] = work(1, "b", 1, 20.801, 20.802)
    assert check(history) == []
    history.attempts[1] = work(1, "b", 1, 20.801, 23.0)
    assert {violation.rule for violation in check(history)} == {"at once"}


def test_a_node_that_gives_up_without_a_fault_is_counted() -> None:
    history = shared()
    lost_for_no_reason(history)
    given_up = Fault(1, GAVE_UP, at(18.1), at(20.1))
    assert not near(given_up, history)
    history.faults.append(given_up)
    assert check(history) == []
    history.faults.append(fault(1, FaultKind.CUT_STORE, 17.0, 19.0))
    assert near(given_up, history)


def test_a_stubborn_agent_may_continue_after_its_node_was_fenced_off() -> None:
    history = shared()
    history.attempts[2] = replace(work(2, "b", 2, 20.61, 41.0), stubborn=True)
    assert check(history) == []


def test_runs_may_wait_while_no_node_can_take_over() -> None:
    history = shared()
    left_lying(history)
    # Each node had a fault in these seconds, and needs a lease to detect the others.
    history.faults += [fault(node, FaultKind.LONG_CUT_ALL, 21.0, 32.0) for node in (0, 2)]
    assert check(history) == []
    assert [seconds for _, _, seconds in recoveries(history)] == [14.9]
