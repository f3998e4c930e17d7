"""Checks the history of a finished world against the rules."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

from proofs.lanecheck.invariants import check_lane, require
from proofs.sim.agent import GRACE, LEASE, WORKED, agent_of
from proofs.sim.clients import TENANT, policy_of
from proofs.sim.group import NODE_LEASE, POLL_SECONDS
from proofs.sim.history import LOST, OK, AcceptOp, CancelOp, Execution, Follow, History, Watch
from proofs.sim.store import Disk
from runlane_server.core.model import (
    CancelScope,
    Folded,
    Message,
    Role,
    RunComplete,
    RunEvent,
    RunKey,
    RunState,
    SessionKey,
    Started,
    Text,
    TextDelta,
    Updated,
    WhenBusy,
)
from runlane_server.core.retry import RetryPolicy
from runlane_server.core.transition import CoveredRun, Receipt
from runlane_server.store.base import BusySession

SLACK = 1.5 + POLL_SECONDS * 1.25
"""Seconds that writes and an agent's own clean-up may take beyond the grace period, and the news of
a cancel between two nodes."""

RECOVERY_SECONDS = 2.5
"""Seconds after the lease of a dead node within which another one recovers its runs."""

MAX_ATTEMPTS = 3
"""The most attempts that a run of a client has if they are lost."""

NO_RETRIES = RetryPolicy((), 1)

WAITING = {RunState.ACCEPTED, RunState.QUEUED}
RUNNING = {RunState.ACTIVE, RunState.FOLDED}


class Checker:
    """The runs of a history."""

    def __init__(self, history: History, disk: Disk) -> None:
        self.history = history
        self.disk = disk
        self.ends: dict[str, RunComplete] = {}
        self.ended_at: dict[str, int] = {}
        self.events: dict[str, list[RunEvent]] = {}
        self.started: dict[str, int] = {}
        self.accepts: dict[str, list[AcceptOp]] = defaultdict(list)
        for tick, logged in history.completes:
            self.ends[logged.complete.run_id] = logged.complete
            self.ended_at[logged.complete.run_id] = tick
        for key, events in history.events.items():
            self.events[key.run_id] = [event for _, event in events]
            starts = [tick for tick, event in events if isinstance(event.body, Started)]
            if starts:
                self.started[key.run_id] = starts[0]
        for op in history.accepts:
            self.accepts[op.run_id].append(op)

    def place_of(self, run_id: str) -> tuple[str, int]:
        """The session of a run that has ended, which is another one after a deletion."""
        session_id, ended_at = self.ends[run_id].session_id, self.ended_at[run_id]
        return session_id, sum(it < ended_at for it in self.history.deletions(session_id))

    def acked(self) -> Iterator[AcceptOp]:
        """The accepts that were answered."""
        return (op for op in self.history.accepts if op.outcome == OK)


def check(history: History, busy: Sequence[BusySession], disk: Disk) -> None:
    """Raises Broken if a rule was broken."""
    require(not busy, f"sessions are busy at the end: {busy}")
    checker = Checker(history, disk)
    _check_accepts(checker)
    _check_ends(checker)
    _check_events(checker)
    _check_order(checker)
    _check_updates(checker)
    _check_attempts(checker)
    _check_agents(checker)
    _check_workers(checker)
    _check_transcripts(checker)
    _check_forks(checker)
    _check_deleted(checker)
    for op in history.cancels:
        _check_cancel(checker, op)
    _check_cancelled(checker)
    for watch in history.watches:
        _check_watch(checker, watch)
    for follow in history.follows:
        _check_follow(checker, follow)
    for lane in disk.lanes():
        check_lane(lane)


# --- Runs ---------------------------------------------------------------------------------------


def _check_accepts(checker: Checker) -> None:
    seqs: dict[tuple[str, int], dict[int, str]] = defaultdict(dict)
    for op in checker.acked():
        require(op.run_id in checker.ends, f"R1, R21: {op.run_id} is accepted and has no end")
        end = checker.ends[op.run_id]
        require(
            (end.session_id, end.accept_seq) == (op.session_id, op.seq),
            f"R3: {op.run_id} is not the run that was accepted",
        )
        known = seqs[checker.place_of(op.run_id)].setdefault(op.seq, op.run_id)
        require(known == op.run_id, f"R4: {op.run_id} and {known} have one accept_seq")
        # A subscription from the position of the accept receives the end.
        logged = next(e for _, e in checker.history.completes if e.complete.run_id == op.run_id)
        kept = logged.position > checker.disk.data.compacted
        require(
            op.position < logged.position or not kept, f"{op.run_id} is accepted behind its own end"
        )
    firsts = [ops for ops in checker.accepts.values() if len(ops) == 1 and ops[0].outcome == OK]
    for (one,) in firsts:
        for (other,) in firsts:
            same = checker.place_of(one.run_id) == checker.place_of(other.run_id)
            if same and one.returned is not None and one.returned < other.invoked:
                require(one.seq < other.seq, f"R4: {other.run_id} comes before {one.run_id}")


def _check_ends(checker: Checker) -> None:
    counted = Counter(logged.complete.run_id for _, logged in checker.history.completes)
    for run_id, count in counted.items():
        require(count == 1, f"R21: {run_id} has {count} ends")
        require(run_id in checker.accepts, f"{run_id} was never asked for")
        end = checker.ends[run_id]
        require(end.state.is_terminal, f"{run_id} ends {end.state}")
        if end.folded_into:
            _check_folded(checker, end)


def _check_folded(checker: Checker, end: RunComplete) -> None:
    host = checker.ends[end.folded_into]
    if end.cancelled and checker.ended_at[end.run_id] != checker.ended_at[host.run_id]:
        alone = end.cancel_reason != host.cancel_reason or not host.cancelled
        if alone:
            return
    require(
        (end.state, end.finish_reason, end.text) == (host.state, host.finish_reason, host.text),
        f"R26: {end.run_id} does not share the end of {host.run_id}",
    )


def _check_events(checker: Checker) -> None:
    for run_id, events in checker.events.items():
        indices = [event.index for event in events]
        require(indices == list(range(1, len(indices) + 1)), f"{run_id} has the events {indices}")
        ends = [event for event in events if isinstance(event.body, RunComplete)]
        require(ends == events[-1:], f"R21: the last event of {run_id} is its end")


def _check_order(checker: Checker) -> None:
    """R7: runs start in accept order, except that an interrupting run and runs that shared a
    retried turn go to the head, and that runs are moved."""
    moved = {op.run_id for op in checker.history.updates if op.may_reorder}
    ends = [end for end in checker.ends.values() if end.run_id in checker.started]
    headed = {
        end.run_id
        for end in ends
        if any(op.when_busy is WhenBusy.INTERRUPT for op in checker.accepts[end.run_id])
        or any(
            isinstance(e.body, Folded) and e.body.run_id == end.run_id
            for e in checker.events[end.run_id]
        )
    }
    for one in ends:
        for later in ends:
            if one.session_id != later.session_id or one.accept_seq >= later.accept_seq:
                continue
            if checker.place_of(one.run_id) != checker.place_of(later.run_id):
                continue
            if later.run_id in headed or {one.run_id, later.run_id} & moved:
                continue
            ordered = checker.started[one.run_id] < checker.started[later.run_id]
            require(ordered, f"R7: {later.run_id} starts before {one.run_id}")


def _check_updates(checker: Checker) -> None:
    """R46: an edit that was answered happened once and before the start, one that was refused did
    not; and each run was started with its last edit."""
    for op in checker.history.updates:
        reported = [
            event.body.revision
            for event in checker.events[op.run_id]
            if isinstance(event.body, Updated) and event.body.prompt_excerpt == op.patch.text
        ]
        if op.patch.text is not None:
            once = len(reported) == 1
            firsts = once if op.outcome == OK else len(reported) <= (op.outcome == LOST)
            # Later updates that leave the prompt alone repeat it.
            later = op.outcome in {OK, LOST} and len(reported) > 1
            require(firsts or later, f"R46: {op.patch} of {op.run_id} is {op.outcome}: {reported}")
    for run_id in {op.run_id for op in checker.history.updates}:
        bodies = [event.body for event in checker.events[run_id]]
        edits = [n for n, body in enumerate(bodies) if isinstance(body, Updated)]
        begun = [n for n, body in enumerate(bodies) if isinstance(body, Started | Folded)]
        if run_id in checker.started and edits and not any(isinstance(b, Folded) for b in bodies):
            require(edits[-1] < begun[0], f"R46: {run_id} is edited after it has started")
        revisions = [body.revision for body in bodies if isinstance(body, Updated)]
        require(revisions == sorted(set(revisions)), f"R46: {run_id} has revisions {revisions}")
        if edits:
            last = bodies[edits[-1]]
            stored = checker.disk.prompt(run_id)
            told_last = isinstance(last, Updated) and last.prompt_excerpt
            require(
                stored == told_last, f"R46: {run_id} has {stored!r}, and {told_last!r} was answered"
            )


def _check_attempts(checker: Checker) -> None:
    """R38: between two attempts of a run no other one of its session starts, unless it interrupts;
    and an agent fails no more attempts than the policy allows."""
    starts: dict[tuple[str, int], list[tuple[int, str]]] = defaultdict(list)
    for key, events in checker.history.events.items():
        place = checker.place_of(key.run_id)
        starts[place] += [(t, key.run_id) for t, e in events if isinstance(e.body, Started)]
    for attempts in starts.values():
        order = [run_id for _, run_id in sorted(attempts)]
        for run_id in set(order):
            first, last = order.index(run_id), len(order) - order[::-1].index(run_id)
            for other in set(order[first:last]) - {run_id}:
                interrupts = [op.when_busy is WhenBusy.INTERRUPT for op in checker.accepts[other]]
                interrupts += [
                    op.patch.when_busy is WhenBusy.INTERRUPT
                    for op in checker.history.updates
                    if op.run_id == other
                ]
                require(any(interrupts), f"R38: {other} starts between attempts of {run_id}")
    for end in checker.ends.values():
        allowed = (policy_of(end.run_id) or NO_RETRIES).max_attempts
        lost = checker.history.losses
        if agent_of(end.run_id) == WORKED:
            lost += MAX_ATTEMPTS - 1
        used = _used_attempts(checker, end)
        require(used <= allowed + lost, f"R38: {end.run_id} has {used} attempts")


def _used_attempts(checker: Checker, end: RunComplete) -> int:
    """The attempts of a run that count: a worker may never have got one, or given it back."""
    if agent_of(end.run_id) != WORKED:
        return end.attempt
    begun = {
        it.attempt
        for it in checker.history.executions
        if it.run_id == end.run_id and it.has_begun and not it.is_given_up
    }
    return len(begun)


def _check_agents(checker: Checker) -> None:
    """The output of agents is what was stored, and no agent ran before its start was committed."""
    for execution in checker.history.executions:
        if execution.agent == WORKED:
            continue
        events = checker.events.get(execution.run_id, [])
        started = checker.started.get(execution.run_id)
        require(
            started is not None and started < execution.entered,
            f"R8: the agent of {execution.run_id} is started before that is committed",
        )
        stored = _text_of(events, execution.attempt)
        said = "".join(execution.said)
        end = checker.ends[execution.run_id]
        whole = end.state is RunState.COMPLETED and end.attempt == execution.attempt
        require(
            said == stored if whole else said.startswith(stored),
            f"{execution.run_id} #{execution.attempt}: {said!r} is stored as {stored!r}",
        )


def _check_workers(checker: Checker) -> None:
    """R33 to R36: the output of an attempt is that of one worker, once and in order; and no attempt
    is lost unless its worker was."""
    by_attempt: dict[tuple[str, int], list[Execution]] = defaultdict(list)
    for execution in checker.history.executions:
        if execution.agent == WORKED:
            by_attempt[execution.run_id, execution.attempt].append(execution)
    for (run_id, attempt), executions in by_attempt.items():
        started = checker.started.get(run_id)
        require(
            started is not None and started < executions[0].entered,
            f"R8: a worker has {run_id} before its start is committed",
        )
        stored = _text_of(checker.events[run_id], attempt)
        said = ["".join(execution.said) for execution in executions]
        end = checker.ends[run_id]
        whole = end.state is RunState.COMPLETED and end.attempt == attempt
        require(
            stored in said if whole else any(text.startswith(stored) for text in said),
            f"R33, R34: {run_id} #{attempt}: {said!r} is stored as {stored!r}",
        )
    for end in checker.ends.values():
        if end.error is not None and end.error.reason == "INTERRUPTED":
            executions = by_attempt.get((end.run_id, end.attempt), [])
            is_worked = agent_of(end.run_id) == WORKED
            require(
                not is_worked or not executions or any(map(_may_be_lost, executions)),
                f"R36: {end.run_id} is interrupted, and its worker was there",
            )


def _may_be_lost(execution: Execution) -> bool:
    is_away = execution.longest_away >= LEASE - 1e-6
    return is_away or execution.is_given_up or not execution.has_begun


def _text_of(events: Sequence[RunEvent], attempt: int) -> str:
    text, now = "", 0
    for event in events:
        if isinstance(event.body, Started):
            now = event.body.attempt
        elif isinstance(event.body, TextDelta) and now == attempt:
            text += event.body.text
    return text


def _check_transcripts(checker: Checker) -> None:
    """R14 to R16, R22: a turn has its prompt, its output, and an end with a finish reason."""
    turns: dict[tuple[str, int], list[Message]] = defaultdict(list)
    for session in checker.disk.data._tables.sessions.values():
        places = [(message.turn, message.ordinal) for message in session.messages]
        require(len(set(places)) == len(places), "a place in the transcript is used twice")
        for message in session.messages:
            turns[session.session.session_id, message.turn].append(message)
        _check_prompts(checker, session.session.session_id, session.messages)
    for messages in turns.values():
        _check_turn(checker, messages)


def _check_prompts(checker: Checker, session_id: str, messages: Sequence[Message]) -> None:
    stand = Counter(message.run_id for message in messages if message.role is Role.USER)
    now = session_id, len(checker.history.deletions(session_id))
    for end in checker.ends.values():
        if checker.place_of(end.run_id) == now:
            times = stand[end.run_id]
            require(times == 1, f"R14, R15, R26: the prompt of {end.run_id} stands {times} times")


def _check_turn(checker: Checker, messages: list[Message]) -> None:
    run_id = messages[0].run_id
    own = [m for m in messages if m.role is Role.USER and m.run_id == run_id]
    require(own == messages[:1], f"R15: the turn of {run_id} begins with its one prompt")
    assistant = [m for m in messages if m.role is Role.ASSISTANT]
    end = checker.ends[run_id]
    require(assistant, f"R14: the turn of {run_id} has no answer")
    require(assistant[-1].finish_reason is end.finish_reason, f"{run_id} ends in two ways")
    require(assistant[-1].message_id == end.message_id, f"{run_id} names its last message")
    text = "".join(p.text for m in assistant for p in m.parts if isinstance(p, Text))
    stored = _text_of(checker.events[run_id], end.attempt)
    # The output of an attempt that was handed over is dropped unless another one followed.
    history = checker.history
    is_worked = agent_of(run_id) == WORKED
    given_up = not text and (history.losses or policy_of(run_id) or is_worked)
    require(
        text == stored or given_up, f"R22: {run_id} said {stored!r} and its transcript is {text!r}"
    )


def _check_forks(checker: Checker) -> None:
    """R48: a fork has the turns of its origin up to a turn, whole, and nothing of later turns;
    one that was refused, or was deleted, is not there."""
    tables = checker.disk.data._tables
    for op in checker.history.forks:
        row = tables.sessions.get(SessionKey(TENANT, op.session_id))
        if op.outcome not in {OK, LOST} and op.may_come_late:
            continue
        if op.outcome not in {OK, LOST} or (op.outcome == OK and op.is_deleted):
            require(row is None, f"R48: {op.session_id} is {op.outcome}, and is there")
            continue
        if row is None:
            require(op.outcome == LOST, f"R48: {op.session_id} was made, and is not there")
            continue
        require(row.session.origin is not None, f"R48: {op.session_id} names no origin")
        turn = 0 if row.session.origin is None else row.session.origin.turn
        require(op.turn in {None, turn}, f"R48: {op.session_id} ends at {turn}, not {op.turn}")
        source = SessionKey(TENANT, op.source)
        whole = tables._up_to(source, tables.sessions[source], turn)
        require(list(row.copied) == list(whole), f"R48: {op.session_id} is no copy of its origin")
        ended = {message.turn for message in whole if message.finish_reason is not None}
        require(
            ended == {message.turn for message in whole},
            f"R48: {op.session_id} has a turn that had not finished",
        )
        require(
            all(message.turn > turn for message in row.messages),
            f"R48: {op.session_id} has turns of its own before its copy ends",
        )


def _check_deleted(checker: Checker) -> None:
    """R3: the runs of deleted sessions are gone and remembered, and their ids were refused."""
    history, tables = checker.history, checker.disk.data._tables
    require(not tables.removals, f"{tables.removals} are never removed")
    for run_id, end in checker.ends.items():
        deleted = history.deletions(end.session_id)[checker.place_of(run_id)[1] :]
        key = RunKey(TENANT, run_id)
        require(
            (key in tables.runs, key in tables.deleted) == (not deleted, bool(deleted)),
            f"R3: {run_id} is deleted at {deleted}, and the store does not agree",
        )
        late = [op for op in checker.accepts[run_id] if deleted and op.invoked > deleted[0]]
        require(
            all(op.outcome != OK for op in late), f"R3: {run_id} was deleted, and is accepted again"
        )


# --- Cancels ------------------------------------------------------------------------------------


def _check_cancel(checker: Checker, op: CancelOp) -> None:
    """R10 to R13, R20: the receipt is correct."""
    covered = {
        run_id: end for run_id, end in checker.ends.items() if end.cancel_reason == op.reason
    }
    for run_id in covered:
        _check_was_there(checker, op, run_id)
    if op.receipts is None:
        return
    named = {run.run_id: run for receipt in op.receipts for run in receipt.cancelled}
    require(
        set(covered) <= set(named), f"R20: {op.reason} names {set(named)}, covered {set(covered)}"
    )
    for receipt in op.receipts:
        require(
            len({run.run_id for run in receipt.cancelled}) == len(receipt.cancelled),
            f"R20: {op.reason} names a run twice",
        )
        for run in receipt.cancelled:
            _check_named(checker, op, receipt, run, ended=run.run_id in covered)
    if op.scope is CancelScope.SESSION:
        _check_complete(checker, op, set(named))


def _check_was_there(checker: Checker, op: CancelOp, run_id: str) -> None:
    """R11, R18."""
    if op.returned is not None:
        before = any(accept.invoked < op.returned for accept in checker.accepts[run_id])
        require(before, f"R11: {op.reason} took {run_id}, which came later")
    end = checker.ends[run_id]
    require(op.session_id in {None, end.session_id}, f"R18: {op.reason} took {run_id}")
    if op.scope is CancelScope.RUN:
        require(op.run_id in {run_id, end.folded_into}, f"R18: {op.reason} took {run_id}")


def _check_named(
    checker: Checker, op: CancelOp, receipt: Receipt, run: CoveredRun, *, ended: bool
) -> None:
    allowed = {
        CancelScope.WAITING: WAITING,
        CancelScope.ACTIVE: RUNNING,
    }.get(op.scope, WAITING | RUNNING)
    if run.state is RunState.ACCEPTED and policy_of(run.run_id) is not None:
        return  # it may have waited for its next attempt (R38)
    require(run.state in allowed, f"R18: {op.reason} covers {run.run_id}, which was {run.state}")
    if run.accept_seq == 0:
        # A reservation; it may have been released, or lost with its node.
        accepts = checker.accepts[run.run_id]
        if len(accepts) > 1 or accepts[0].outcome != OK or accepts[0].node != op.node:
            return
    else:
        require(run.accept_seq <= receipt.fence_accept_seq, "R20: the fence is above the runs")
    require(ended, f"R20: {op.reason} names {run.run_id}, which did not end by it")
    # The node of the run may have died before the cancel, which the others do not know yet.
    recovery = NODE_LEASE + RECOVERY_SECONDS if checker.history.lost_hosts else 0
    late = checker.history.ended_when[run.run_id] - op.at > GRACE + SLACK + recovery
    ended_at = checker.ended_at[run.run_id]
    died = any(op.invoked < down < ended_at for down in checker.history.downs)
    died = died or any(
        since < ended_at and until > op.invoked for since, until in checker.history.pauses
    )
    require(died or not late, f"R9: {run.run_id} ends long after {op.reason}")


def _check_complete(checker: Checker, op: CancelOp, named: set[str]) -> None:
    """R10: runs accepted before the cancel that had not ended after it were covered."""
    for accept in checker.acked():
        if op.session_id not in {None, accept.session_id} or op.returned is None:
            continue
        if accept.returned is None or accept.returned > op.invoked or accept.run_id in named:
            continue
        if checker.ended_at[accept.run_id] > op.returned:
            end = checker.ends[accept.run_id]
            require(end.cancelled, f"R10: {op.reason} does not cover {accept.run_id}")


def _check_cancelled(checker: Checker) -> None:
    """R11, R12: only a cancel or an interrupting run cancels a run."""
    reasons = {op.reason for op in checker.history.cancels}
    for end in checker.ends.values():
        interrupter = end.cancel_reason.removeprefix("interrupted by ")
        known = end.cancel_reason in reasons or interrupter in checker.accepts
        require(known == end.cancelled, f"R12: {end.run_id} is {end.state}: {end.cancel_reason!r}")


# --- Subscribers --------------------------------------------------------------------------------


def _check_watch(checker: Checker, watch: Watch) -> None:
    """R25: every event after the cursor, once, in order, and none that was not committed."""
    if watch.start is None:
        return
    start = watch.start
    lost = [(low, high) for low, high in watch.lost]
    wanted = [
        logged
        for _, logged in checker.history.completes
        if logged.position > start
        and watch.wanted.matches(logged.complete)
        and not any(low < logged.position <= high for low, high in lost)
    ]
    missing = [e.position for e in wanted if e not in watch.came]
    require(not missing, f"R25: {watch.name} never gets {missing}")
    require(watch.came == wanted, f"R25: {watch.name} gets what it should not")
    require(
        all(one.position < other.position for one, other in pairwise(watch.came)),
        f"R25: {watch.name} gets events out of order",
    )


def _check_follow(checker: Checker, follow: Follow) -> None:
    wanted = [event for event in checker.events[follow.run_id] if event.index > follow.after]
    got = follow.came == (wanted[: len(follow.came)] if follow.cut else wanted)
    require(got, f"a follower of {follow.run_id} does not get its events")
