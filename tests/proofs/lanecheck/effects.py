"""The effects of each command, written a second time in the plainest way.

Each function returns the rule that a step broke, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from proofs.lanecheck.commands import (
    LATER,
    Command,
    Verb,
    is_cancelling,
    is_parked,
    live,
    live_ids,
)
from runlane_server.core.agents import DEFAULT_AGENT
from runlane_server.core.model import CancelScope, RunState, Updated, WhenBusy
from runlane_server.core.transition import (
    CoveredRun,
    Lane,
    LaneRun,
    Receipt,
    RunChange,
    Transition,
)
from runlane_server.core.update import Place

_S = RunState


def check_effect(before: Lane, command: Command, made: Transition) -> str | None:
    """The rule that a command broke, if it did."""
    return _frame(before, command, made) or _EFFECTS[command.verb](before, command, made)


def _frame(  # noqa: PLR0911 - one per rule
    before: Lane, command: Command, made: Transition
) -> str | None:
    """No command but an update reorders waiting runs, or touches another's reservation."""
    after = made.lane
    old = [run.run_id for run in before.waiting]
    new = [run.run_id for run in after.waiting if run.run_id in old]
    waits = waits_for_retry(before)
    if waits is not None and after.waiting and waits.run_id in live_ids(after):
        ahead = after.active is not None and after.active.run_id != waits.run_id
        if ahead or (after.active is None and after.waiting[0].run_id != waits.run_id):
            return "nothing overtakes a run that waits for its next attempt (R38)"
    if command.verb is Verb.UPDATE:
        old, new = ([it for it in ids if it != command.run_id] for ids in (old, new))
    if new != [run_id for run_id in old if run_id in new]:
        return "waiting runs keep their order (R7)"
    agents = {run.run_id: run.agent for run in live(before)}
    if any(agents.get(run.run_id, run.agent) != run.agent for run in live(after)):
        return "a run keeps its agent (R31)"
    wanted = command.agent or before.agent or DEFAULT_AGENT
    if any(change.request is not None and change.run.agent != wanted for change in made.runs):
        return "a run gets the agent it names, else that of its session, else the default (R31)"
    if after.agent != before.agent and not made.removed:
        return "only its owner changes the agent of a session (R31)"
    if command.verb not in {Verb.RESERVE, Verb.RELEASE, Verb.ACCEPT, Verb.CANCEL, Verb.REMOVE} and (
        before.reservations != after.reservations
    ):
        return "only accept and cancel touch reservations (R6, R28)"
    return None


def _reservation(before: Lane, command: Command, made: Transition) -> str | None:
    """Reserving and releasing touch one reservation and nothing else (R6)."""
    kept = [held for held in before.reservations if held.token != command.token]
    rest = [held for held in made.lane.reservations if held.token != command.token]
    own = [held for held in made.lane.reservations if held.token == command.token]
    if kept != rest or made.needs_commit or live(before) != live(made.lane):
        return "a reservation changes nothing else (R6)"
    if command.verb is Verb.RELEASE:
        return None if not own else "what is released is gone (R6)"
    named = any(held.covered and held.run_id == command.run_id for held in kept)
    if [(held.run_id, held.covered) for held in own] != [(command.run_id, named)]:
        return "a reservation is covered with its run only (R11, R12, R20)"
    return None


def _accept(  # noqa: PLR0911 - one per rule
    before: Lane, command: Command, made: Transition
) -> str | None:
    held = next(held for held in before.reservations if held.token == command.token)
    if made.lane.reservations != tuple(each for each in before.reservations if each is not held):
        return "an accept takes its own reservation (R6)"
    if command.run_id in live_ids(before):
        known = made.reply in live(before) and made.reply.run_id == command.run_id
        return None if known and not made.needs_commit else "a run is accepted once (R3)"
    new = next((change for change in made.runs if change.run.run_id == command.run_id), None)
    if new is None or made.reply != new.run:
        return "an accept replies with its run"
    interrupts = command.when_busy is WhenBusy.INTERRUPT and not held.covered
    waits = waits_for_retry(before)
    if waits is not None and interrupts:
        ended = [complete.run_id for complete in made.completes if complete.cancelled]
        if ended != [waits.run_id]:
            return "INTERRUPT cancels the run that waits for its next attempt (R27, R38)"
        before = before._replace(waiting=before.waiting[1:])
    unchanged = made.lane.active == before.active
    cancelled = is_cancelling(made.lane.active) and not unchanged
    if not (cancelled if interrupts and _is_coverable(before) else unchanged):
        return "INTERRUPT cancels the active run, others do not (R11, R27)"
    if held.covered:
        covered = new.run.state is _S.CANCELLED and made.lane.waiting == before.waiting
        return None if covered else "a cancel covers accepts that have begun (R10)"
    return _place_of(before, command, made)


def _place_of(before: Lane, command: Command, made: Transition) -> str | None:
    at_head = command.when_busy is WhenBusy.INTERRUPT
    old = [run.run_id for run in before.waiting]
    wanted = [command.run_id, *old] if at_head else [*old, command.run_id]
    if [run.run_id for run in made.lane.waiting] != wanted:
        return "a run goes to the end, one that interrupts to the head (R7, R27)"
    return None


def _update(  # noqa: PLR0911 - one per rule
    before: Lane, command: Command, made: Transition[Any]
) -> str | None:
    if command.is_known_update(before):
        same = made.lane == before and not made.needs_commit
        return None if same else "a repeated update changes nothing (R46)"
    run = next(run for run in before.waiting if run.run_id == command.run_id)
    interrupts = command.sends is WhenBusy.INTERRUPT
    waits = waits_for_retry(before)
    cancelled = [waits.run_id] if interrupts and waits is not None else []
    if [complete.run_id for complete in made.completes] != cancelled:
        return "INTERRUPT cancels the run that waits for its next attempt (R27, R38)"
    covers = interrupts and _is_coverable(before)
    if covers != (made.lane.active != before.active):
        return "INTERRUPT cancels the active run, and nothing else touches it (R27, R46)"
    if covers and not is_cancelling(made.lane.active):
        return "INTERRUPT cancels the active run (R27)"
    old = [other.run_id for other in before.waiting if other.run_id not in cancelled]
    wanted = _order(before, command, old)
    if [other.run_id for other in made.lane.waiting] != wanted:
        return "an update moves its run as asked, and no other (R46, R47)"
    ranks = {other.run_id: other.rank for other in before.waiting}
    if any(ranks[it.run_id] != it.rank for it in made.lane.waiting if it.run_id != run.run_id):
        return "a move writes no other run (R47)"
    sends = command.sends or run.when_busy
    is_edited = command.edits or sends is not run.when_busy
    has_effect = bool(is_edited or cancelled or covers or wanted != old)
    now = next(other for other in made.lane.waiting if other.run_id == run.run_id)
    if now.revision != run.revision + has_effect or now.when_busy is not sends:
        return "an update with an effect counts as one (R46)"
    said = [event for event in made.events if isinstance(event.body, Updated)]
    if len(said) != is_edited or made.needs_commit != has_effect or made.reply != now:
        return "an edit is reported once, and an update replies with its run (R46)"
    edits = [change.edit for change in made.runs if change.edit is not None]
    contents = [edit.content for edit in edits if edit.content is not None]
    if len(edits) != has_effect or len(contents) != command.edits:
        return "what is edited is committed (R46)"
    return None


def _order(before: Lane, command: Command, old: list[str]) -> list[str]:
    """The queue after an update."""
    run_id = command.run_id
    others = [other for other in old if other != run_id]
    begun = [run.run_id for run in before.waiting if run.turn and run.run_id in others]
    first = others.index(begun[-1]) + 1 if begun else 0
    if command.sends is WhenBusy.INTERRUPT:
        at = 0
    elif command.place is None:
        return old
    elif command.place is Place.FIRST:
        at = first
    elif command.place is Place.LAST:
        at = len(others)
    elif command.place is Place.BEFORE:
        at = others.index(command.anchor)
    else:
        at = max(first, others.index(command.anchor) + 1)
    return [*others[:at], run_id, *others[at:]]


def _dispatch(before: Lane, command: Command, made: Transition) -> str | None:
    waits = waits_for_retry(before)
    early = waits is not None and waits.not_before > command.at
    if before.active is not None or not before.waiting or early:
        idle = made.lane == before and not made.needs_commit and made.reply is None
        if not idle:
            return f"one run is active at a time, {'after its backoff (R38)' if early else '(R7)'}"
        return None
    head = min(before.waiting, key=lambda run: run.rank)
    active = made.lane.active
    if active is None or active.run_id != head.run_id or active.attempt != head.attempt + 1:
        return "the first one is started (R7)"
    if active.host != (command.host or ""):
        return "it is active on the node that starts it (R32)"
    if made.reply != active or [run.run_id for run in made.lane.waiting] != [
        run.run_id for run in before.waiting[1:]
    ]:
        return "the others wait on (R7)"
    return None


def _covered(before: Lane, command: Command) -> tuple[CoveredRun, ...]:
    """The runs that a cancel must cover (R10, R13, R18)."""
    scope = command.scope
    runs: list[LaneRun] = []
    if before.active is not None and _is_coverable(before):
        named = scope is CancelScope.RUN and before.active.run_id == command.run_id
        if named or scope in {CancelScope.SESSION, CancelScope.ACTIVE}:
            runs += (before.active, *before.folded)
    waits = waits_for_retry(before)
    if waits is not None and scope in {CancelScope.SESSION, CancelScope.ACTIVE}:
        runs.append(waits)
    if scope in {CancelScope.SESSION, CancelScope.WAITING}:
        runs += (run for run in before.waiting if run is not waits)
    if scope is CancelScope.RUN:
        runs += (run for run in before.waiting if run.run_id == command.run_id)
        runs += (
            run for run in before.folded if run.run_id == command.run_id and run.state is _S.FOLDED
        )
    runs.sort(key=lambda run: run.accept_seq)
    covered = [CoveredRun(run.run_id, run.accept_seq, run.state) for run in runs]
    for held in before.reservations:
        meant = scope in {CancelScope.SESSION, CancelScope.WAITING} or (
            scope is CancelScope.RUN and held.run_id == command.run_id
        )
        named_already = {run.run_id for run in covered} | live_ids(before)
        if meant and not held.covered and held.run_id not in named_already:
            covered.append(CoveredRun(held.run_id, 0, _S.ACCEPTED))
    return tuple(covered)


def _cancel(before: Lane, command: Command, made: Transition) -> str | None:
    wanted = _covered(before, command)
    if made.reply != Receipt(before.key.session_id, wanted, before.accept_seq):
        return "the receipt names what was covered, with its state then (R20)"
    run_ids = {covered.run_id for covered in wanted}
    changes = {change.run.run_id: change for change in made.runs}
    for run in live(before):
        if (run.run_id in run_ids) != _is_covered(run, changes.get(run.run_id)):
            return "what the receipt names is cancelled, and nothing else (R10, R18)"
    new = {held.run_id for held in made.lane.reservations if held.covered}
    old = {held.run_id for held in before.reservations if held.covered}
    if new - old != run_ids - live_ids(before) or not old <= new:
        return "accepts that have begun are covered as the receipt says (R10)"
    tokens = ([held.token for held in each.reservations] for each in (before, made.lane))
    if next(tokens) != next(tokens):
        return "a cancel neither makes nor releases a reservation (R6)"
    if not wanted and (made.needs_commit or made.lane != before):
        return "a cancel that covers nothing changes nothing (R12, R13)"
    return None


def _is_covered(run: LaneRun, change: RunChange | None) -> bool:
    """Whether a change is that of a run that a cancel covered just now."""
    if change is None or change.run.cancel_reason == run.cancel_reason:
        return False
    was_at_work = run.state in {_S.ACTIVE, _S.INPUT_REQUIRED, _S.FOLDED}
    ends = change.run.state is _S.CANCELLED
    return ends or (was_at_work and change.run.state is _S.CANCELLING)


def _drain(before: Lane, _: Command, made: Transition[Any]) -> str | None:
    meant = (run for run in before.waiting if run.when_busy is WhenBusy.FOLD and run.turn == 0)
    own = (run for run in meant if before.active is None or run.agent == before.active.agent)
    joining = sorted(own, key=lambda run: run.accept_seq)
    if not _was_active(before):
        joining = []
    run_ids = [run.run_id for run in joining]
    if [run.run_id for run in made.reply] != run_ids:
        return "a step takes what waits to be folded, of its agent, in accept order (R26, R27)"
    if [run.run_id for run in made.lane.folded] != [
        *(run.run_id for run in before.folded),
        *run_ids,
    ]:
        return "folded runs are in the turn (R26)"
    left = [run for run in before.waiting if run.run_id not in run_ids]
    return None if list(made.lane.waiting) == left else "the others wait on (R27)"


def _ends(before: Lane, made: Transition, state: RunState) -> str | None:
    """The active run and those in its turn end in a state; the others wait on, or are first."""
    turn = [run.run_id for run in live(before) if run not in before.waiting]
    if [complete.run_id for complete in made.completes] != turn:
        return "a turn ends the runs in it, and no other (R21, R24)"
    if any(complete.state is not state for complete in made.completes):
        return f"the runs of the turn are {state} (R19)"
    return _hands_over(before, made)


def _hands_over(before: Lane, made: Transition) -> str | None:
    old = [run.run_id for run in before.waiting]
    new = [run.run_id for run in made.lane.waiting]
    return None if made.lane.active is None and old == new else "the queue lives on (R8, R24)"


def _finish(before: Lane, command: Command, made: Transition) -> str | None:
    active = before.active
    if active is not None and _is_repeated(active, command):
        return _repeats(before, active, made)
    expired = before.active is not None and before.active.asking.expired
    ended = _S.COMPLETED if command.ok and not expired else _S.FAILED
    wrong = _ends(before, made, ended if _is_coverable(before) else _S.CANCELLED)
    return wrong or (None if made.reply == made.completes[0] else "finish replies with its end")


def _is_repeated(active: LaneRun, command: Command) -> bool:
    """Whether the policy of the run asks for another attempt (R38)."""
    policy = active.retry
    at_work = active.state in {_S.ACTIVE, _S.INPUT_REQUIRED} and not active.asking.expired
    if policy is None or command.ok or not at_work:
        return False
    return command.error.reason in policy.reasons and active.failures + 1 < policy.max_attempts


def _repeats(before: Lane, active: LaneRun, made: Transition) -> str | None:
    """The run goes back to its place and waits there until its backoff is over (R38)."""
    back = [run.run_id for run in (active, *before.folded, *before.waiting)]
    if made.lane.active is not None or [run.run_id for run in made.lane.waiting] != back:
        return "a repeated run keeps its place, with what it had folded (R7, R38)"
    head = made.lane.waiting[0]
    if (head.failures, head.not_before) != (active.failures + 1, LATER):
        return "a failure is counted, and the next attempt waits for its backoff (R38)"
    if made.reply is not None or made.completes:
        return "a repeated run has not ended (R21, R38)"
    return None


def waits_for_retry(lane: Lane) -> LaneRun | None:
    """The run that waits for its next attempt."""
    if lane.active is not None or not lane.waiting or not lane.waiting[0].not_before:
        return None
    return lane.waiting[0]


def _node_lost(before: Lane, command: Command, made: Transition) -> str | None:  # noqa: PLR0911
    active = before.active
    if command.is_late(before):
        kept = made.lane == before and not made.needs_commit and not made.reply
        return None if kept else "a run is not lost with a node where it is not any more (R36)"
    if is_parked(active) and active is not None and not active.asking.expired:
        return None if made.lane == before else "a parked run has no node (R44)"
    if made.reply != (active is not None):
        return "node_lost replies with whether a run was active"
    if active is None:
        return None if not made.needs_commit else "where none is active, none is lost"
    if not _is_coverable(before):
        return _ends(before, made, _S.CANCELLED)
    if active.asking.expired:
        return _ends(before, made, _S.FAILED)
    waits = active.state is _S.INPUT_REQUIRED
    if waits and active.asking.resumable:
        back = [run.run_id for run in (*before.folded, *before.waiting)]
        kept = [run.run_id for run in made.lane.waiting] == back
        return None if kept else "what it had folded waits again (R7)"
    if active.attempt - active.failures - active.asking.extra_attempts >= active.max_attempts:
        return _ends(before, made, _S.FAILED)
    back = [run.run_id for run in (active, *before.folded, *before.waiting)]
    if made.lane.active is not None or [run.run_id for run in made.lane.waiting] != back:
        return "a retried run goes back to the head, with what it had folded (R7)"
    return None if not made.completes else "a retried run has not ended (R21)"


def _hand_back(before: Lane, command: Command, made: Transition) -> str | None:
    """Without output, the attempt does not count, the last one neither (R37)."""
    active = before.active
    if active is None or before.folded or not _was_active(before):
        kept = made.lane.find(active.run_id) if active is not None else None
        if active is not None and kept is not None and _counted(kept) != _counted(active):
            return "an attempt with output counts (R37)"
        return _node_lost(before, command, made)
    back = made.lane.waiting[0]
    if made.lane.active is not None or back.run_id != active.run_id or made.completes:
        return "a run that is given back goes to the head (R37)"
    return None if _counted(back) == _counted(active) - 1 else "its attempt does not count (R37)"


def _counted(run: LaneRun) -> int:
    """The number of attempts that count."""
    return run.attempt - run.asking.extra_attempts


def _adopt(before: Lane, command: Command, made: Transition) -> str | None:
    """The run changes its node and nothing else (R36)."""
    active = before.active
    waits = active is not None and active.state is _S.INPUT_REQUIRED
    stays = waits or command.is_late(before)
    moved = active if active is None or stays else active._replace(host=command.host or "")
    if made.lane != before._replace(active=moved) or made.reply != moved:
        return "an adopted run changes its node and nothing else (R36)"
    return None if not (made.events or made.messages) else "an adoption is no event (R36)"


def _fail_waiting(before: Lane, command: Command, made: Transition) -> str | None:
    failed = [complete.run_id for complete in made.completes if complete.state is _S.FAILED]
    meant = [run.run_id for run in before.waiting if command.agent in {"", run.agent}]
    left = [run.run_id for run in before.waiting if run.run_id not in meant]
    if [run.run_id for run in made.lane.waiting] != left or failed != meant:
        return "all that wait for the agent end failed, and no others (R30, R32)"
    untouched = made.lane.active == before.active and made.lane.folded == before.folded
    return None if untouched and made.reply == len(failed) else "the active run is not touched"


def _remove(before: Lane, _: Command, made: Transition) -> str | None:
    return None if made.removed and made.lane == Lane(before.key) else "what is removed is gone"


def _input(before: Lane, _: Command, made: Transition) -> str | None:
    """Input changes one run, and no other; `inputs` has the rest."""
    left = {run.run_id: run for run in live(before)}
    same = [run.run_id for run in made.lane.waiting] == [run.run_id for run in before.waiting]
    others = len(made.runs) <= 1 and {run.run_id for run in live(made.lane)} == set(left)
    return None if same and others else "input concerns one run (R40)"


def _ask(before: Lane, command: Command, made: Transition) -> str | None:
    """An agent that starts again gives back what it folded in."""
    gives_back = command.restart and made.needs_commit and not is_parked(before.active)
    if not (gives_back and before.folded):
        return _input(before, command, made)
    back = [run.run_id for run in (*before.folded, *before.waiting)]
    kept = [run.run_id for run in made.lane.waiting] == back and not made.lane.folded
    return None if kept and not made.completes else "what it had folded waits again (R7, R44)"


def _is_coverable(lane: Lane) -> bool:
    return lane.active is not None and lane.active.state in {_S.ACTIVE, _S.INPUT_REQUIRED}


def _was_active(lane: Lane) -> bool:
    return lane.active is not None and lane.active.state is _S.ACTIVE


_EFFECTS: Mapping[Verb, Callable[[Lane, Command, Transition], str | None]] = {
    Verb.RESERVE: _reservation,
    Verb.RELEASE: _reservation,
    Verb.ACCEPT: _accept,
    Verb.DISPATCH: _dispatch,
    Verb.CANCEL: _cancel,
    Verb.DRAIN: _drain,
    Verb.FINISH: _finish,
    Verb.ASK: _ask,
    Verb.ANSWER: _input,
    Verb.EXPIRE: _input,
    Verb.RESUME: _input,
    Verb.NODE_LOST: _node_lost,
    Verb.HAND_OVER: _node_lost,
    Verb.HAND_BACK: _hand_back,
    Verb.ADOPT: _adopt,
    Verb.UPDATE: _update,
    Verb.FAIL_WAITING: _fail_waiting,
    Verb.REMOVE: _remove,
}
