"""Checks a history against the rules after any sequence of kills."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from proofs.crash import cancel_rules, event_rules, nodes_rules, transcript_rules, worked
from proofs.crash.history import History, Outcome
from runlane import FinishReason, Run


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken rule, by its name, and a description of the place."""

    rule: str
    what: str


def check(history: History) -> list[Violation]:
    """All violations in a history."""
    rules = {
        "lost": _lost,
        "ghost": _ghost,
        "inconsistent": _inconsistent,
        "retry": _retried,
        "seq": _sequence,
        "attempts": _attempts,
        "read": _reads,
        "defect": _defects,
        **event_rules.RULES,
        **cancel_rules.RULES,
        **transcript_rules.RULES,
        **(nodes_rules.RULES if history.lease else {}),
        **(worked.RULES if history.worker_lease else {}),
    }
    return [Violation(name, what) for name, rule in rules.items() for what in rule(history)]


def _lost(history: History) -> Iterator[str]:
    """Every acknowledged run exists (R1)."""
    listed = {run.run_id for run in history.final.listed}
    for run_id in history.acknowledged:
        if run_id not in history.final.runs:
            yield f"GetRun does not know {run_id}, which was acknowledged"
        if run_id not in listed:
            yield f"ListRuns does not have {run_id}, which was acknowledged"


def _ghost(history: History) -> Iterator[str]:
    """No refused run exists, and none that was never sent (R6)."""
    tried = {attempt.run_id for attempt in history.accepts} | history.final.sentinels
    possible = {each.run_id for each in history.accepts if each.outcome is not Outcome.REFUSED}
    possible |= history.final.sentinels
    for run in history.final.listed:
        if run.run_id not in tried:
            yield f"{run.run_id} was never sent"
        elif run.run_id not in possible:
            yield f"{run.run_id} is there, and every accept of it was refused"


def _inconsistent(history: History) -> Iterator[str]:
    """Every interface lists the same runs, and all have ended."""
    final = history.final
    listed = [run.run_id for run in final.listed]
    if len(listed) != len(set(listed)):
        yield "ListRuns has a run twice"
    for run_id in set(listed) ^ set(final.runs):
        yield f"{run_id} is in one of GetRun and ListRuns"
    for run in final.runs.values():
        if not run.state.terminal or run.run_complete is None:
            yield f"{run.run_id} never ended: it is {run.state}"
        elif run.run_complete.state is not run.state:
            yield f"{run.run_id} is {run.state}, its end says {run.run_complete.state}"
    for listing in final.listed:
        if (whole := final.runs.get(listing.run_id)) and _plain(whole) != _plain(listing):
            yield f"GetRun and ListRuns differ about {listing.run_id}"


def _plain(run: Run) -> Run:
    """The end without the text, which ListRuns leaves out."""
    if run.run_complete is None:
        return run
    return replace(run, run_complete=replace(run.run_complete, text="", text_truncated=False))


def _retried(history: History) -> Iterator[str]:
    """All accepts of one run id are answered with the same run (R3)."""
    for run_id, tries in history.acknowledged.items():
        known = {
            (each.run.session_id, each.run.run_id, each.run.accept_seq, each.run.accepted_at)
            for each in tries
            if each.run is not None
        }
        if (run := history.final.runs.get(run_id)) is not None:
            known.add((run.session_id, run.run_id, run.accept_seq, run.accepted_at))
        if len(known) != 1:
            yield f"{run_id} is more than one run: {known}"
        elif next(iter(known))[:2] != (tries[0].session_id, run_id):
            yield f"the accept of {run_id} was answered with another run"
    errors = {each.error for each in history.accepts}
    if "RUN_ID_CONFLICT" in errors:
        yield "a retry of the same request was a conflict"


def _sequence(history: History) -> Iterator[str]:
    """accept_seq is unique in a session, in the order of the acknowledgements (R4)."""
    seqs: defaultdict[tuple[str, int], set[str]] = defaultdict(set)
    for run in history.final.listed:
        seqs[run.session_id, run.accept_seq].add(run.run_id)
    for (session_id, seq), run_ids in seqs.items():
        if len(run_ids) > 1:
            yield f"{sorted(run_ids)} of session {session_id} all have accept_seq {seq}"
    first_sent = history.first_sent
    by_session: defaultdict[str, list[tuple[int, int, int, str]]] = defaultdict(list)
    for run_id, tries in history.acknowledged.items():
        accepted = tries[0].run
        if accepted is not None:
            answered = min(each.done for each in tries)
            place = (accepted.accept_seq, first_sent[run_id], answered, run_id)
            by_session[accepted.session_id].append(place)
    for places in by_session.values():
        earliest, of = float("inf"), ""
        for _, sent, answered, run_id in sorted(places, reverse=True):
            if earliest < sent:
                yield f"{of} was acknowledged before {run_id} was sent, and has a higher accept_seq"
            if answered < earliest:
                earliest, of = answered, run_id


def _attempts(history: History) -> Iterator[str]:
    """No run exceeds its max_attempts, or is given up before it has used them."""
    for run in history.final.runs.values():
        if worked.counted_attempts(run, history) > run.max_attempts:
            yield f"{run.run_id} was started {run.attempt} times of {run.max_attempts}"
        complete = run.run_complete
        interrupted = complete and complete.finish_reason is FinishReason.INTERRUPTED
        # A folded run ends with its turn, whose attempts are those of another run.
        if interrupted and run.folded_into is None and run.attempt < run.max_attempts:
            yield f"{run.run_id} was given up at attempt {run.attempt} of {run.max_attempts}"


def _reads(history: History) -> Iterator[str]:
    """Every terminal event that any client saw is the run's only one (R21)."""
    for read in history.reads:
        run = history.final.runs.get(read.run_id)
        if run is None:
            yield f"{read.run_id} was seen, and is gone"
        elif read.state.terminal and _plain(read).run_complete != _plain(run).run_complete:
            yield f"{read.run_id} was seen {read.state}, and ended otherwise"


def _defects(history: History) -> Iterator[str]:
    """No call ends with an error that is a defect of the server."""
    for accept in history.accepts:
        if accept.error == "INTERNAL":
            yield f"the accept of {accept.run_id} failed: INTERNAL"
    for cancel in history.cancels:
        if cancel.error == "INTERNAL":
            yield f"{cancel.reason} failed: INTERNAL"
