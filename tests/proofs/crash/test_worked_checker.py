"""The checker finds violations of workers: each history here comes from a broken server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from proofs.crash import nodes_rules, worked
from proofs.crash.faults import NODES, WORKER_LEASE, FaultKind
from proofs.crash.history import History
from proofs.crash.test_checker import at, ended
from proofs.crash.test_nodes_checker import fault, work
from proofs.crash.worked import WORKED, counted_attempts, words_of
from runlane import Accepted, EventBody, Folded, RunEvent, Started, TextDelta

WORKER = NODES
OTHER = NODES + 1
JOINED = "joined"
RUN = next(f"r{n}" for n in range(100) if words_of(f"r{n}") == 5)


def said(attempt: int, count: int = 5) -> str:
    return "".join(f"{attempt}.{n} " for n in range(count))


def worked_on() -> History:
    """A sound history: the worker of a run was killed, and another one began it again."""
    history = History(lease=2.0, worker_lease=WORKER_LEASE)
    run = replace(ended(RUN, 1), agent=WORKED, attempt=2, max_attempts=2)
    history.final.runs[RUN] = run
    bodies: list[tuple[float, EventBody]] = [
        (1.0, Accepted(1)),
        (2.0, Started(1)),
        (2.5, TextDelta(said(1, 3))),
        (23.5, Started(2)),
        (24.0, TextDelta(said(2, 1))),
        (24.1, Folded(JOINED, RUN)),
        (24.2, TextDelta(f"[{JOINED}] ")),
        (25.0, TextDelta(said(2).removeprefix(said(2, 1)))),
    ]
    assert run.run_complete is not None
    events = [RunEvent(n, at(second), body) for n, (second, body) in enumerate(bodies, start=1)]
    events.append(RunEvent(9, at(25.5), replace(run.run_complete, ended_at=at(25.5))))
    history.final.events[RUN] = events
    history.attempts = [work(WORKER, RUN, 1, 2.1, None), work(OTHER, RUN, 2, 23.6, 25.4)]
    history.faults = [fault(WORKER, FaultKind.KILL, 3.0, 5.0)]
    return history


def broken(history: History) -> set[str]:
    rules = {**nodes_rules.RULES, **worked.RULES}
    return {name for name, rule in rules.items() if list(rule(history))}


def _say(history: History, at_index: int, text: str) -> None:
    events = history.final.events[RUN]
    events[at_index - 1] = replace(events[at_index - 1], body=TextDelta(text))


def test_a_sound_history_of_workers_has_no_violation() -> None:
    history = worked_on()
    assert broken(history) == set()
    assert counted_attempts(history.final.runs[RUN], history) == 2


# --- Doctored histories --------------------------------------------------------------------------


def word_lost(history: History) -> None:
    _say(history, 3, "1.0 1.2 ")


def word_twice(history: History) -> None:
    _say(history, 3, "1.0 1.1 1.1 1.2 ")


def word_of_a_lost_attempt(history: History) -> None:
    """Output of the worker that was lost reached the attempt that followed."""
    _say(history, 5, "2.0 1.3 ")


def end_lost(history: History) -> None:
    _say(history, 8, "2.1 2.2 2.3 ")


def joined_run_never_received(history: History) -> None:
    _say(history, 7, "")


def joined_run_received_twice(history: History) -> None:
    _say(history, 7, f"[{JOINED}] [{JOINED}] ")


def lost_with_a_node(history: History) -> None:
    """A node was killed, which must not cost a run of a worker its attempt (R36)."""
    history.faults = [fault(0, FaultKind.KILL, 3.0, 5.0)]
    history.attempts[0] = work(WORKER, RUN, 1, 2.1, 3.0)


def not_stopped(history: History) -> None:
    """A worker that is connected went on after its attempt was over."""
    history.faults = [fault(OTHER, FaultKind.KILL, 3.0, 5.0)]
    history.attempts[0] = work(WORKER, RUN, 1, 2.1, 24.5)


def unaware_too_long(history: History) -> None:
    history.faults = [fault(WORKER, FaultKind.LONG_CUT_ALL, 3.0, 23.0)]
    history.attempts[0] = work(WORKER, RUN, 1, 2.1, 60.0)


def lease_that_never_ends(history: History) -> None:
    history.faults = [fault(WORKER, FaultKind.KILL, 3.0, 5.0)]
    later = 2 * WORKER_LEASE + 15.0
    events = history.final.events[RUN]
    events[3:] = [replace(one, time=at(later)) for one in events[3:]]
    run = history.final.runs[RUN]
    assert run.run_complete is not None
    complete = replace(run.run_complete, ended_at=at(later))
    history.final.runs[RUN] = replace(run, run_complete=complete)
    history.attempts[1] = work(OTHER, RUN, 2, later, later)


@pytest.mark.parametrize(
    ("doctor", "rules"),
    [
        (word_lost, {"output"}),
        (word_twice, {"output"}),
        (word_of_a_lost_attempt, {"output"}),
        (end_lost, {"output"}),
        (joined_run_never_received, {"output"}),
        (joined_run_received_twice, {"output"}),
        (lost_with_a_node, {"uncaused"}),
        (not_stopped, {"at once", "uncaused"}),
        (unaware_too_long, {"at once"}),
        (lease_that_never_ends, {"late"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_doctored_history_has_the_violation(
    doctor: Callable[[History], None], rules: set[str]
) -> None:
    history = worked_on()
    doctor(history)
    assert broken(history) == rules


def test_a_worker_that_was_cut_off_may_go_on_for_a_while() -> None:
    history = worked_on()
    history.faults = [fault(WORKER, FaultKind.LONG_CUT_ALL, 3.0, 27.0)]
    history.attempts[0] = work(WORKER, RUN, 1, 2.1, 30.0)
    assert broken(history) == set()


def test_a_turn_that_was_lost_on_its_way_does_not_count() -> None:
    history = worked_on()
    history.faults = [fault(0, FaultKind.CUT_CLIENTS, 2.0, 5.0)]
    history.attempts[0] = work(WORKER, RUN, 1, 2.1, 2.2)
    del history.final.events[RUN][2]
    assert broken(history) == set()
    assert counted_attempts(history.final.runs[RUN], history) == 1
