"""Checks terminal events, the events of each run, and the order of runs."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from proofs.crash.history import History, Rule, SubscriberRecord
from proofs.crash.worked import WORKED
from runlane import Folded, Run, RunComplete, RunEvent, RunState, Started, WhenBusy


def _missing(history: History) -> Iterator[str]:
    """Every accepted run has its terminal event, and no other run has one (R21)."""
    logged = {complete.run_id for complete in history.final.log}
    runs = history.final.runs
    for run_id in runs.keys() - logged:
        yield f"{run_id} has no terminal event"
    for run_id in logged - runs.keys():
        yield f"there is a terminal event of {run_id}, which is no run"
    for complete in history.final.log:
        run = runs.get(complete.run_id)
        if run is not None and run.run_complete != complete:
            yield f"the terminal event of {complete.run_id} is not what GetRun says"


def _twice(history: History) -> Iterator[str]:
    """No subscriber receives a terminal event twice (R21)."""
    subscribers = [
        ("the log", history.final.log),
        *((one.name, one.events) for one in history.subscribers),
    ]
    for name, events in subscribers:
        for run_id, count in Counter(complete.run_id for complete in events).items():
            if count > 1:
                yield f"{name} has {count} terminal events of {run_id}"


def _heard(history: History) -> Iterator[str]:
    """A subscriber that resumes gets all events after its start, once and in order (R25)."""
    for one in history.subscribers:
        log = _wanted(history.final.log, one.session_id)
        if one.from_beginning:
            begin = 0
        else:
            ids = [complete.run_id for complete in log]
            first = one.events[0].run_id if one.events else ""
            begin = ids.index(first) if first in ids else 0
            yield from _begins_in_time(history, one, log[:begin])
        yield from _differs(one.name, one.events, log[begin:])


def _begins_in_time(
    history: History, one: SubscriberRecord, before: Sequence[RunComplete]
) -> Iterator[str]:
    """No run that ended after a subscriber started precedes the first event it received."""
    sent = history.first_sent
    for complete in before:
        if complete.run_id == one.after_accept_of:
            yield f"{one.name} began at the accept of {complete.run_id}, and did not hear its end"
        if not one.after_accept_of and sent.get(complete.run_id, 0) > one.established:
            yield f"{one.name} did not hear the end of {complete.run_id}, accepted after it began"


def _replayed(history: History) -> Iterator[str]:
    """A cursor from before the crash is still valid."""
    ids = [complete.run_id for complete in history.final.log]
    for replay in history.final.replays:
        begin = ids.index(replay.after) + 1 if replay.after in ids else 0
        after = f"the replay after {replay.after}"
        yield from _differs(after, replay.events, history.final.log[begin:])


def _differs(
    name: str, events: Sequence[RunComplete], expected: Sequence[RunComplete]
) -> Iterator[str]:
    had, should = [e.run_id for e in events], [e.run_id for e in expected]
    if lost := [run_id for run_id in should if run_id not in set(had)]:
        yield f"{name} did not get {lost}"
    elif more := [run_id for run_id in had if run_id not in set(should)]:
        yield f"{name} got {more}, which others did not"
    elif list(dict.fromkeys(had)) != should:
        yield f"{name} got the events in another order"
    contents = {complete.run_id: complete for complete in expected}
    for complete in events:
        if contents.get(complete.run_id, complete) != complete:
            yield f"{name} got another end of {complete.run_id}"


def _wanted(log: Sequence[RunComplete], session_id: str) -> Sequence[RunComplete]:
    return [each for each in log if session_id in {"", each.session_id}]


def _gaps(history: History) -> Iterator[str]:
    """The events of a run have no gap, end with its end, and are the same for all clients."""
    for run_id, events in history.final.events.items():
        yield from _numbered(f"the log of {run_id}", events)
    for one in history.followers:
        name = f"a follower of {one.run_id}"
        yield from _numbered(name, one.events)
        whole = history.final.events.get(one.run_id, [])
        if one.events != whole[: len(one.events)]:
            yield f"{name} saw something else than is in the log"


def _numbered(name: str, events: Sequence[RunEvent]) -> Iterator[str]:
    if [event.index for event in events] != list(range(1, len(events) + 1)):
        yield f"{name} has the indices {[event.index for event in events]}"
    ends = [event for event in events if isinstance(event.body, RunComplete)]
    if len(ends) != 1 or events[-1] is not ends[0]:
        yield f"{name} has {len(ends)} ends, or goes on after one"


@dataclass(frozen=True, slots=True)
class Span:
    """The time in which an attempt was active, as far as the history shows it."""

    begin: datetime
    end: datetime
    run_id: str


def was_waiting(run: Run) -> bool:
    """Whether a started run may have been cancelled while it waited for its next attempt."""
    may_retry = run.attempt < run.max_attempts or run.agent == WORKED
    return run.state is RunState.CANCELLED and may_retry


def spans(run: Run, events: Sequence[RunEvent]) -> list[Span]:
    """The attempts of a run. A lost attempt is taken to end with its last event."""
    starts = [n for n, event in enumerate(events) if isinstance(event.body, Started)]
    found = []
    for begin, end in itertools.pairwise((*starts, len(events))):
        last = events[end - 1]
        if isinstance(last.body, RunComplete) and was_waiting(run):
            last = events[end - 2]
        found.append(Span(events[begin].time, last.time, run.run_id))
    return found


def _overlaps(history: History) -> Iterator[str]:
    """At most one run of a session is active (R7)."""
    by_session: defaultdict[str, list[Span]] = defaultdict(list)
    for run in history.final.runs.values():
        events = history.final.events.get(run.run_id, [])
        by_session[run.session_id] += spans(run, events)
    for session_id, found in by_session.items():
        found.sort(key=lambda span: (span.begin, span.end))
        for earlier, later in itertools.pairwise(found):
            if later.begin < earlier.end:
                yield f"in {session_id} {later.run_id} began while {earlier.run_id} was active"


def _order(history: History) -> Iterator[str]:
    """Runs start in accept order, except interrupting runs and runs once folded (R7)."""
    by_session: defaultdict[str, list[tuple[int, datetime, str]]] = defaultdict(list)
    for run in history.final.runs.values():
        events = history.final.events.get(run.run_id, [])
        starts = [event.time for event in events if isinstance(event.body, Started)]
        joined = any(isinstance(e.body, Folded) and e.body.run_id == run.run_id for e in events)
        if starts and not joined and run.when_busy is not WhenBusy.INTERRUPT:
            by_session[run.session_id].append((run.accept_seq, starts[0], run.run_id))
    for places in by_session.values():
        for (_, earlier, first), (_, later, second) in itertools.pairwise(sorted(places)):
            if later < earlier:
                yield f"{second} was started before {first}, which was accepted before it"


RULES: Mapping[str, Rule] = {
    "event missing": _missing,
    "event twice": _twice,
    "heard": _heard,
    "replay": _replayed,
    "gap": _gaps,
    "overlap": _overlaps,
    "order": _order,
}
