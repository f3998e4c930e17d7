"""The rules of input requests, written a second time (R40 to R44)."""

from __future__ import annotations

from collections.abc import Iterable

from proofs.lanecheck.commands import Command, Verb, is_cancelling, live
from proofs.lanecheck.require import require
from runlane_server.core.input import InputChange, InputState
from runlane_server.core.model import (
    InputAnswered,
    InputExpired,
    InputRequested,
    InputWithdrawn,
    RunState,
)
from runlane_server.core.transition import Lane, LaneRun, Transition

_I = InputState
_CLOSINGS = InputAnswered | InputWithdrawn | InputExpired
_EVENTS = {
    _I.ANSWERED: InputAnswered,
    _I.WITHDRAWN: InputWithdrawn,
    _I.EXPIRED: InputExpired,
}


def check_input_lane(lane: Lane) -> None:
    """Raises Broken if the requests of a lane are not ones that may be."""
    for run in live(lane):
        keys = [one.key for one in run.asking.pending]
        require(len(set(keys)) == len(keys), "nobody is asked twice (R44)")
        late = {key for _, _, key in run.asking.late}
        require(not late & set(keys), "what is closed is not open (R41)")
        require(not (run.folded_into and run.asking.pending), "a folded run asks nothing")
        exact = run is not lane.active or run.state is RunState.INPUT_REQUIRED
        require(not (exact and run.asking.late), "the event of a closed request follows at once")
        require(not run.asking.parked or run is lane.active, "only the active run is parked")
        require(not run.asking.pending or not is_cancelling(run), "a cancel withdraws (R42)")
    active = lane.active
    waits = active is not None and active.state is RunState.INPUT_REQUIRED
    ready = waits and active is not None and not (active.asking.pending or active.asking.expired)
    require(lane.can_resume == ready, "a run goes on when all is answered (R41)")


def check_inputs(before: Lane, command: Command, made: Transition) -> None:
    """Raises Broken if a step breaks a rule of input requests."""
    old, new = _open(live(before)), _open(live(made.lane))
    changes = {change.input_request_id: change for change in made.inputs}
    require(len(changes) == len(made.inputs), "a transition names a request once")
    opened = {name for name, change in changes.items() if change.state is _I.OPEN}
    closed = {name for name, change in changes.items() if change.state is not _I.OPEN}
    if not made.removed:
        require(opened == set(new) - set(old), "a new request is committed (R40)")
        require(closed == set(old) - set(new), "a request leaves by its end, once (R41, R42)")
    require(all(changes[name].request for name in opened), "a new request is there to be read")
    _check_closings(before, command, closed, changes)
    _check_events(before, made, opened, changes)
    _check_numbers(before, command, made)
    _check_command(before, command, made)


def _open(runs: Iterable[LaneRun]) -> dict[str, str]:
    return {one.input_request_id: run.run_id for run in runs for one in run.asking.pending}


def _check_closings(
    before: Lane, command: Command, closed: set[str], changes: dict[str, InputChange]
) -> None:
    for name in closed:
        change = changes[name]
        named = name == command.input_id_of(before)
        if command.verb is Verb.ANSWER:
            require(change.state is _I.ANSWERED and named and change.answer, "R41: the answer")
        elif command.verb is Verb.EXPIRE and named:
            item = command.input_of(before)
            has_default = item is not None and item.default_json is not None
            require(change.state is _I.EXPIRED, "R43: it expires")
            require((change.answer is not None) == has_default, "R43: its default applies")
        else:
            require(change.state is _I.WITHDRAWN, "what ends a run withdraws (R42)")


def _check_events(
    before: Lane, made: Transition, opened: set[str], changes: dict[str, InputChange]
) -> None:
    """Every closed request gets one event, at once or late."""
    told = [
        event.body.input_request_id for event in made.events if isinstance(event.body, _CLOSINGS)
    ]
    require(len(set(told)) == len(told), "a request is closed once (R45)")
    late = {name for run in live(before) for _, name, _ in run.asking.late}
    still = {name for run in live(made.lane) for _, name, _ in run.asking.late}
    now = {name for name, change in changes.items() if change.state is not _I.OPEN}
    if not made.removed:
        require(set(told) == (late | now) - still, "subscribers learn of every end (R45)")
    for event in made.events:
        body = event.body
        change = changes.get(getattr(body, "input_request_id", ""))
        if isinstance(body, _CLOSINGS) and change is not None:
            require(type(body) is _EVENTS[change.state], "the event says what happened (R45)")
    asked = {
        event.body.input_request_id
        for event in made.events
        if isinstance(event.body, InputRequested)
    }
    require(opened <= asked, "subscribers learn of every request (R45)")


def _check_numbers(before: Lane, command: Command, made: Transition) -> None:
    """Only a command of its supervisor writes events of a run whose agent is emitting."""
    active = before.active
    if active is None or active.state is RunState.INPUT_REQUIRED:
        return
    if command.verb in {Verb.ANSWER, Verb.EXPIRE, Verb.CANCEL, Verb.ACCEPT, Verb.UPDATE}:
        own = [event for event in made.events if event.run_id == active.run_id]
        require(not own, "events of an agent at work are numbered by its supervisor")


def _check_command(before: Lane, command: Command, made: Transition) -> None:
    was, active = before.active, made.lane.active
    if command.verb is Verb.ASK and command.repeated:
        require(made.lane == before and not made.needs_commit, "nobody is asked twice (R44)")
        return
    match command.verb:
        case Verb.ASK if was is not None and not (is_cancelling(was) or was.asking.expired):
            settled = command.key in {key for _, _, key in was.asking.late}
            waits = active is not None and active.state is RunState.INPUT_REQUIRED
            expected = not settled or command.park or was.state is RunState.INPUT_REQUIRED
            require(waits == expected, "a run that asks waits, and stays active (R40, R44)")
            known = next((one for one in was.asking.pending if one.key == command.key), None)
            if known is not None:
                require(made.reply == (known.input_request_id,), "nobody is asked twice (R44)")
            if command.park and active is not None and not was.asking.parked:
                _check_park(before, command, made, active)
        case Verb.ASK:
            require(not made.needs_commit, "a run that is about to end asks nothing (R42)")
        case Verb.RESUME:
            _check_resume(before, command, made)
        case Verb.EXPIRE if was is not None and was.run_id == command.run_id:
            item = command.input_of(before)
            fails = item is not None and item.default_json is None
            fails = fails and was.state is RunState.INPUT_REQUIRED
            ends = active is not None and bool(active.asking.expired)
            require(ends == (fails or bool(was.asking.expired)), "without a default it fails (R43)")
        case Verb.FINISH if was is not None and was.asking.expired and not is_cancelling(was):
            error = made.completes[0].error
            require(error is not None and error.reason == "INPUT_EXPIRED", "it fails (R43)")
        case Verb.NODE_LOST | Verb.HAND_OVER:
            _check_lost(before, command, made)
        case _:
            pass


def _check_park(before: Lane, command: Command, made: Transition, active: LaneRun) -> None:
    """An agent that leaves without a checkpoint starts again, and what it folded in waits again."""
    require(active.asking.parked and not active.host, "a parked run has no node (R44)")
    require(active.asking.restarts == command.restart, "without a checkpoint it starts again (R44)")
    if command.restart:
        waiting = {run.run_id for run in made.lane.waiting}
        folded = {run.run_id for run in before.folded}
        require(not made.lane.folded and folded <= waiting, "what it folded in waits again (R44)")
    else:
        require(made.lane.folded == before.folded, "its turn goes on (R44)")


def _check_resume(before: Lane, command: Command, made: Transition) -> None:
    was, active = before.active, made.lane.active
    if not before.can_resume or was is None or active is None:
        require(not made.needs_commit and made.reply is None, "R41: not before all is answered")
        return
    require(active.state is RunState.ACTIVE and active.run_id == was.run_id, "it goes on (R41)")
    consumed = (active.attempt - active.asking.extra_attempts) - (
        was.attempt - was.asking.extra_attempts
    )
    require(consumed == 0, "a resumption consumes no attempt (R44)")
    again = was.asking.restarts
    require(active.attempt == was.attempt + again, "a lost agent begins again, fenced off (R44)")
    require(not active.asking.parked, "it has an agent again")
    require(active.host == (command.host or ""), "it goes on where it has a slot (R41)")


def _check_lost(before: Lane, command: Command, made: Transition) -> None:
    was, active = before.active, made.lane.active
    if was is None or was.state is not RunState.INPUT_REQUIRED or was.asking.expired:
        return
    if was.asking.parked or command.is_late(before):
        require(made.lane == before and not made.needs_commit, "a parked run has no node (R44)")
    elif was.asking.resumable:
        kept = active is not None and active.run_id == was.run_id and active.asking.parked
        require(kept, "an agent that can resume loses nothing (R44)")
        require(
            active is not None and active.asking.pending == was.asking.pending, "R44: still asked"
        )
