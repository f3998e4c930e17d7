"""The invariants of every lane, and of every step from one lane to the next.

Each check covers a single step, but together they prove whole histories: no step loses a run, ends
one twice or reuses a place in the transcript, so no history does. Nothing here calls the rules
under test; a rule that a check needs is written a second time.
"""

from __future__ import annotations

from itertools import pairwise

from proofs.lanecheck.commands import Command, Verb, is_parked, live, streamed
from proofs.lanecheck.effects import check_effect
from proofs.lanecheck.inputs import check_input_lane, check_inputs
from proofs.lanecheck.require import Broken, require
from runlane_server.core.lane import ATTEMPT_ORDINALS, TABLE
from runlane_server.core.model import (
    Accepted,
    FinishReason,
    Message,
    Role,
    RunComplete,
    RunState,
    Started,
    ToolCall,
    ToolResult,
)
from runlane_server.core.transition import Lane, LaneRun, RunChange, Transition

__all__ = ["Broken", "check", "check_lane", "require"]

_S = RunState

_GIVEN_UP = frozenset(
    {
        (_S.ACTIVE, _S.ACCEPTED),
        (_S.ACTIVE, _S.FAILED),
        (_S.INPUT_REQUIRED, _S.ACCEPTED),
        (_S.INPUT_REQUIRED, _S.FAILED),
        (_S.FOLDED, _S.QUEUED),
        (_S.FOLDED, _S.FAILED),
        (_S.CANCELLING, _S.CANCELLED),
        (_S.QUEUED, _S.ACCEPTED),
    }
)

STEPS: dict[Verb, frozenset[tuple[RunState | None, RunState]]] = {
    Verb.RESERVE: frozenset(),
    Verb.RELEASE: frozenset(),
    Verb.REMOVE: frozenset(),
    Verb.ACCEPT: frozenset(
        {
            (None, _S.ACCEPTED),
            (None, _S.QUEUED),
            (None, _S.CANCELLED),
            (_S.ACCEPTED, _S.QUEUED),
            (_S.ACCEPTED, _S.CANCELLED),
            (_S.ACTIVE, _S.CANCELLING),
            (_S.INPUT_REQUIRED, _S.CANCELLING),
            (_S.FOLDED, _S.CANCELLING),
        }
    ),
    Verb.UPDATE: frozenset(
        {
            (_S.ACCEPTED, _S.QUEUED),
            (_S.QUEUED, _S.ACCEPTED),
            (_S.ACCEPTED, _S.CANCELLED),
            (_S.ACTIVE, _S.CANCELLING),
            (_S.INPUT_REQUIRED, _S.CANCELLING),
            (_S.FOLDED, _S.CANCELLING),
        }
    ),
    Verb.DISPATCH: frozenset({(_S.ACCEPTED, _S.ACTIVE)}),
    Verb.CANCEL: frozenset(
        {
            (_S.ACCEPTED, _S.CANCELLED),
            (_S.QUEUED, _S.CANCELLED),
            (_S.QUEUED, _S.ACCEPTED),
            (_S.ACTIVE, _S.CANCELLING),
            (_S.INPUT_REQUIRED, _S.CANCELLING),
            (_S.FOLDED, _S.CANCELLING),
            (_S.FOLDED, _S.CANCELLED),
        }
    ),
    Verb.DRAIN: frozenset({(_S.QUEUED, _S.FOLDED), (_S.ACTIVE, _S.ACTIVE)}),
    Verb.FINISH: frozenset(
        {
            (_S.ACTIVE, _S.COMPLETED),
            (_S.ACTIVE, _S.FAILED),
            (_S.ACTIVE, _S.ACCEPTED),
            (_S.INPUT_REQUIRED, _S.ACCEPTED),
            (_S.FOLDED, _S.QUEUED),
            (_S.INPUT_REQUIRED, _S.COMPLETED),
            (_S.INPUT_REQUIRED, _S.FAILED),
            (_S.FOLDED, _S.COMPLETED),
            (_S.FOLDED, _S.FAILED),
            (_S.CANCELLING, _S.CANCELLED),
            (_S.QUEUED, _S.ACCEPTED),
        }
    ),
    Verb.ASK: frozenset({(_S.ACTIVE, _S.INPUT_REQUIRED), (_S.FOLDED, _S.QUEUED)}),
    Verb.ANSWER: frozenset(),
    Verb.EXPIRE: frozenset(),
    Verb.RESUME: frozenset({(_S.INPUT_REQUIRED, _S.ACTIVE)}),
    Verb.NODE_LOST: _GIVEN_UP,
    Verb.HAND_OVER: _GIVEN_UP,
    Verb.HAND_BACK: _GIVEN_UP,
    Verb.ADOPT: frozenset(),
    Verb.FAIL_WAITING: frozenset(
        {(_S.ACCEPTED, _S.FAILED), (_S.QUEUED, _S.FAILED), (_S.QUEUED, _S.ACCEPTED)}
    ),
}
"""From where to where one command may take a run."""


def check(before: Lane, command: Command, made: Transition) -> None:
    """Raises Broken if a step breaks a rule. `before` satisfies `check_lane`."""
    check_lane(made.lane)
    _check_accounts(before, made)
    _check_states(before, command, made)
    _check_events(before, command, made)
    _check_attempts(before, made)
    _check_completes(made)
    _check_transcript(before, made)
    _check_places(before, made)
    check_inputs(before, command, made)
    wrong = check_effect(before, command, made)
    require(wrong is None, wrong or "")


# --- One lane -----------------------------------------------------------------------------------


def check_lane(lane: Lane) -> None:
    """Raises Broken if a lane is not one that may be."""
    runs = live(lane)
    require(len({run.run_id for run in runs}) == len(runs), "a run is in the lane once")
    require(len({run.accept_seq for run in runs}) == len(runs), "an accept_seq is used once (R4)")
    require(
        all(0 < run.accept_seq <= lane.accept_seq for run in runs), "accept_seq is counted (R4)"
    )
    tokens = [held.token for held in lane.reservations]
    require(len(set(tokens)) == len(tokens), "a reservation is held once (R6)")
    require(lane.is_busy == bool(runs or lane.reservations), "a lane with work is busy (R8)")
    require(
        lane.can_start == (lane.active is None and lane.waiting != ()),
        "a run is started where none is active, and only there (R7, R8)",
    )
    require(
        list(lane.runs) == sorted(runs, key=lambda run: run.accept_seq),
        "`runs` are all runs in accept order",
    )
    _check_active(lane)
    _check_waiting(lane)
    check_input_lane(lane)
    own = [run.turn for run in (lane.active, *lane.waiting) if run is not None and run.turn]
    require(len(set(own)) == len(own), "a turn belongs to one run")
    require(all(turn <= lane.turn for turn in own), "turns are counted")


def _check_active(lane: Lane) -> None:
    active = lane.active
    if active is None:
        require(not lane.folded, "runs are folded into an active turn only (R26)")
        return
    at_work = {_S.ACTIVE, _S.INPUT_REQUIRED}
    require(active.state in {*at_work, _S.CANCELLING}, "the active run is active (R9)")
    require(active.attempt > 0, "the active run was started")
    require(not active.not_before, "an active run waits for no retry (R38)")
    require(active.turn > 0, "the active run has its place in the transcript")
    shared = _S.FOLDED if active.state in at_work else _S.CANCELLING
    for run in lane.folded:
        require(run.state is shared, "a folded run goes the way of its turn (R10)")
        require(run.folded_into == active.run_id, "folded runs say into which (R26)")
        require(run.turn == active.turn, "a folded run shares the turn")


def _check_waiting(lane: Lane) -> None:
    for n, run in enumerate(lane.waiting):
        first = n == 0 and lane.active is None
        wanted = _S.ACCEPTED if first else _S.QUEUED
        require(run.state is wanted, "the first of an idle lane is accepted, others queued (R8)")
        require(not run.folded_into, "a waiting run is not folded")
        require(not run.cancel_reason, "no waiting run is covered by a cancel (R10)")
        require(not run.not_before or first, "who waits for a retry is the first (R38)")
        require(not run.not_before or run.failures, "only a failed attempt waits (R38)")
    require(
        all(one.rank < next_one.rank for one, next_one in pairwise(lane.waiting)),
        "waiting runs are ordered by rank (R7)",
    )
    require(
        all(run.rank <= lane.accept_seq for run in lane.waiting),
        "a run that an older release appends, with its accept_seq as rank, is the last (R7)",
    )


# --- One step -----------------------------------------------------------------------------------


def _check_accounts(before: Lane, made: Transition) -> None:
    """No run is lost or doubled, and all that changed is there to be committed."""
    after = made.lane
    old = {run.run_id: run for run in live(before)}
    new = {run.run_id: run for run in live(after)}
    changed = {change.run.run_id: change for change in made.runs}
    require(len(changed) == len(made.runs), "a transition names a run once")
    entered = {run_id for run_id, change in changed.items() if change.request is not None}
    ended = {run_id for run_id, change in changed.items() if change.complete is not None}
    require(not entered & set(old), "only a run that is new comes with its request")
    require(set(changed) <= set(old) | entered, "only runs of the lane change")
    require(set(new) == (set(old) | entered) - ended, "runs leave by their RunComplete (R21)")
    require(after.accept_seq == before.accept_seq + len(entered) or made.removed, "R4: by ones")
    for seq, run_id in enumerate(sorted(entered, key=lambda each: changed[each].run.accept_seq), 1):
        require(changed[run_id].run.accept_seq == before.accept_seq + seq, "R4: in accept order")
    for run_id, run in new.items():
        if run_id in changed:
            require(changed[run_id].run == run, "what is committed is what is in the lane")
        else:
            require(_settled(old[run_id]) == _settled(run), "what changed is committed")
    for run_id in set(old) & set(changed):
        seqs = (old[run_id].accept_seq, changed[run_id].run.accept_seq)
        require(seqs[0] == seqs[1], "accept_seq never changes (R4)")


def _settled(run: LaneRun) -> tuple[object, ...]:
    """A run without its count of events: that of the active run is the agent's."""
    return (
        run.run_id,
        run.accept_seq,
        run.state,
        run.when_busy,
        run.rank,
        run.attempt,
        run.max_attempts,
        run.turn,
        run.folded_into,
        run.cancel_reason,
        run.failures,
        run.not_before,
        run.asking,
        run.host,
        run.revision,
        run.last_update,
    )


def _check_states(before: Lane, command: Command, made: Transition) -> None:
    old = {run.run_id: run.state for run in live(before)}
    for change in made.runs:
        step = (old.get(change.run.run_id), change.run.state)
        same = step[0] is step[1]
        require(same or step in STEPS[command.verb], f"{command.verb} takes no run {step}")
        require(same or _in_table(*step), f"TABLE has no way {step}")
        require(
            change.run.state.is_terminal == (change.complete is not None),
            "a run is terminal exactly if it has its RunComplete (R21)",
        )


def _in_table(old: RunState | None, new: RunState) -> bool:
    """Whether one trigger, or two in one step, lead from a state to another."""
    reached = {after for (state, _), after in TABLE.items() if state is old}
    reached |= {after for (state, _), after in TABLE.items() if state in reached}
    return new in reached


def _check_events(before: Lane, command: Command, made: Transition) -> None:
    """Events are numbered without a gap, and what ends a run is its last one."""
    counts = {run.run_id: run.events for run in live(before)}
    counting = {Verb.DRAIN, Verb.FINISH, Verb.NODE_LOST, Verb.HAND_OVER, Verb.HAND_BACK}
    active = before.active
    asks = command.verb is Verb.ASK and made.needs_commit
    lost = {Verb.NODE_LOST, Verb.HAND_OVER, Verb.HAND_BACK}
    kept = command.verb in lost and is_parked(active) and not (active and active.asking.expired)
    kept = kept or command.is_late(before)
    if active is not None and (command.verb in counting or asks) and not kept:
        counts[active.run_id] = streamed(before)
    ended: set[str] = set()
    for event in made.events:
        require(event.run_id not in ended, "nothing comes after run_complete (R21)")
        counts[event.run_id] = counts.get(event.run_id, 0) + 1
        require(event.index == counts[event.run_id], "events are numbered without a gap")
        if isinstance(event.body, RunComplete):
            ended.add(event.run_id)
        if isinstance(event.body, Accepted):
            require(event.index == 1, "accepted is the first event")
    for change in made.runs:
        run = change.run
        require(run.events == counts.get(run.run_id), "a run counts its events")
        require(
            (run.run_id in ended) == run.state.is_terminal,
            "an ended run has its run_complete (R21)",
        )
    for run in live(made.lane):
        require(run.events == counts.get(run.run_id), "the lane counts a run's events")
    changed = {change.run.run_id for change in made.runs}
    require(all(event.run_id in changed for event in made.events), "a run with events has changed")


def _check_attempts(before: Lane, made: Transition) -> None:
    """A number names one attempt: what is repeated for a lost one never reaches another."""
    numbers = {run.run_id: run.attempt for run in live(before)}
    started: dict[str, list[int]] = {}
    for event in made.events:
        if isinstance(event.body, Started):
            started.setdefault(event.run_id, []).append(event.body.attempt)
    for change in made.runs:
        run_id, last = change.run.run_id, change.run.attempt
        before_it = numbers.get(run_id, 0)
        require(last >= before_it, "the number of an attempt is not used again (R33)")
        begun = list(range(before_it + 1, last + 1))
        require(started.get(run_id, []) == begun, "every attempt announces itself (R38)")


def _check_completes(made: Transition) -> None:
    logged = tuple(event.body for event in made.events if isinstance(event.body, RunComplete))
    require(made.completes == logged, "terminal events are in the order of the events")
    for change in made.runs:
        complete, run = change.complete, change.run
        if complete is None:
            continue
        require(complete in logged, "the RunComplete is the event (R21)")
        require(
            (complete.run_id, complete.accept_seq, complete.state, complete.folded_into)
            == (run.run_id, run.accept_seq, run.state, run.folded_into),
            "RunComplete and run agree (R19, R23)",
        )
        require(
            complete.cancelled == (complete.finish_reason is FinishReason.CANCELED),
            "cancelled and finish reason agree (R19)",
        )
        require(
            complete.cancelled == bool(complete.cancel_reason), "a cancelled run has the reason"
        )
        require(
            (complete.error is not None) == (run.state is _S.FAILED), "a failed run has its error"
        )


# --- The transcript -----------------------------------------------------------------------------


def _check_transcript(before: Lane, made: Transition) -> None:
    """A turn begins once, by its prompt, and ends once, with its run."""
    places = [(message.turn, message.ordinal) for message in made.messages]
    require(len(set(places)) == len(places), "a place in the transcript is used once")
    ids = [message.message_id for message in made.messages]
    require(len(set(ids)) == len(ids), "a message id is used once")
    old = {run.run_id: run for run in live(before)}
    begun = [message for message in made.messages if message.ordinal == 0]
    fresh = set() if made.removed else set(range(before.turn + 1, made.lane.turn + 1))
    require({message.turn for message in begun} == fresh, "each turn begins with its prompt (R15)")
    for message in begun:
        require(message.role is Role.USER, "a turn begins with its prompt")
    turns: dict[int, list[Message]] = {}
    for message in sorted(made.messages, key=lambda each: (each.turn, each.ordinal)):
        if message.ordinal:
            turns.setdefault(message.turn, []).append(message)
    owners = {_check_turn_of(change, old, begun, turns, made) for change in made.runs}
    require(set(turns) <= owners, "only the end of a run writes the rest of a turn")


def _check_places(before: Lane, made: Transition) -> None:
    """No step writes where an earlier one may have written, so a session uses each place once."""
    had, has = _attempts_over(before), _attempts_over(made.lane)
    for message in made.messages:
        if not message.ordinal:
            continue
        is_open = message.turn in had or message.turn > before.turn
        require(is_open, "a turn that has ended is not written again")
        over = had.get(message.turn, 0) * ATTEMPT_ORDINALS
        require(message.ordinal > over, "a place of an earlier attempt is not used again")
        later = message.turn not in has or message.ordinal <= has[message.turn] * ATTEMPT_ORDINALS
        require(later, "a later attempt writes behind it")


def _attempts_over(lane: Lane) -> dict[int, int]:
    """For each turn that has not ended, how many of its attempts write no more."""
    over = {run.turn: run.attempt for run in lane.waiting if run.turn}
    if lane.active is not None:
        over[lane.active.turn] = lane.active.attempt - 1 + lane.active.asking.restarts
    return over


def _check_turn_of(
    change: RunChange,
    old: dict[str, LaneRun],
    begun: list[Message],
    turns: dict[int, list[Message]],
    made: Transition,
) -> int:
    """Checks the turn of one run; returns it if the run ended it, else 0."""
    run, complete = change.run, change.complete
    had = old[run.run_id].turn if run.run_id in old else 0
    opened = [message.turn for message in begun if message.run_id == run.run_id]
    if run.folded_into:
        require(not opened, "a folded run has no turn of its own (R26)")
        was_folded = run.run_id in old and old[run.run_id].folded_into
        require(was_folded or had == 0, "a run that has a turn keeps it (R15)")
        if complete is not None:
            ends = {host.message_id for host in made.completes if host.run_id == run.folded_into}
            require(complete.message_id in (ends or {""}), "a folded run shares the end (R26)")
        return 0
    if run.run_id in old and old[run.run_id].folded_into:
        require(run.turn == 0, "a run that is folded no more has no turn yet")
        return 0
    require(opened == ([run.turn] if run.turn != had else []), "a prompt is written once (R15)")
    require(had in {0, run.turn}, "a run that has a turn keeps it (R15)")
    if complete is None:
        return 0
    _check_end(run, complete, turns.get(run.turn, []))
    return run.turn


def _check_end(run: LaneRun, complete: RunComplete, turn: list[Message]) -> None:
    require(run.turn > 0, "every run that ends has a turn (R14)")
    first = turn[0].ordinal if turn else 1
    ordinals = [message.ordinal for message in turn]
    require(ordinals == list(range(first, first + len(turn))), "no holes")
    require(first == 1 or run.attempt > 0, "it begins where the prompt ends")
    said = [message for message in turn if message.role is Role.ASSISTANT]
    require(said, "a turn ends with an assistant message (R14, R15)")
    last = said[-1]
    require(last.finish_reason is complete.finish_reason, "it has the finish reason (R14)")
    require(last.message_id == complete.message_id, "RunComplete names it (R23)")
    after = turn[turn.index(last) + 1 :]
    require(all(message.role is Role.TOOL for message in after), "nothing is said after it")
    require(all(message.finish_reason is not None for message in said), "each says why it ends")
    open_calls: set[str] = set()
    for message in turn:
        results = {part.tool_call_id for part in message.parts if isinstance(part, ToolResult)}
        require(results == open_calls, "calls are answered right behind the message (R16)")
        open_calls = {part.tool_call_id for part in message.parts if isinstance(part, ToolCall)}
    require(not open_calls, "no call stays open (R16)")
    for message in turn:
        own = message.role is not Role.USER
        require(own == (message.run_id == run.run_id), "prompts carry the id of their run (R26)")
