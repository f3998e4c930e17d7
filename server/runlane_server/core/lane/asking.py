"""Input requests of a run: asked, answered, expired and withdrawn (R40 to R45)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias, cast

from runlane_server.core.errors import InputClosed, InputLimit
from runlane_server.core.input import (
    MAX_INPUTS,
    MAX_OPEN_INPUTS,
    NO_INPUT,
    Answer,
    InputChange,
    InputRequest,
    InputState,
    LateInput,
    OpenInput,
    Park,
)
from runlane_server.core.lane.edit import Edit, the_active
from runlane_server.core.lane.parking import park_for_restart
from runlane_server.core.lane.states import AT_WORK, Trigger, advance, next_state
from runlane_server.core.model import (
    EventBody,
    InputAnswered,
    InputExpired,
    InputRequested,
    InputWithdrawn,
    Micros,
    Resumed,
    RunState,
    Started,
)
from runlane_server.core.transition import Lane, LaneRun, Transition
from runlane_server.core.turn import DraftMessage

ClosedInput: TypeAlias = InputAnswered | InputWithdrawn | InputExpired

_CLOSED: Mapping[InputState, type[ClosedInput]] = MappingProxyType(
    {
        InputState.ANSWERED: InputAnswered,
        InputState.WITHDRAWN: InputWithdrawn,
        InputState.EXPIRED: InputExpired,
    }
)
"""The event of a closed request, by the state it was closed with."""


def ask(
    lane: Lane,
    run_id: str,
    attempt: int,
    requests: tuple[InputRequest, ...],
    *,
    at: Micros,
    events: int,
    number: int,
    resumable: bool = False,
    park: Park | None = None,
    tail: tuple[EventBody, ...] = (),
    content: tuple[DraftMessage, ...] = (),
) -> Transition[tuple[str, ...]]:
    """Asks people, and releases the slot of the run (R40).

    Replies with the id of the request for each question: another one if a request with its key is
    pending or was closed meanwhile, as nobody is asked twice (R44). Replies with nothing if the run
    is about to end: a cancel covers it, or a request has expired. `tail` are the last events of an
    agent that parks, and `content` is its output. `number` is one more than the `asks` of the run
    that the supervisor knows: an ask that it repeats because the store did not confirm it changes
    nothing. Raises InputLimit, and IllegalCommand if the attempt is not the active one.
    """
    active = the_active(lane, run_id, attempt)
    edit = Edit(lane, at)
    if active.state not in AT_WORK or active.asking.expired:
        return edit.done(reply=())
    if active.asking.asks >= number:
        return edit.done(reply=tuple(request.input_request_id for request in requests))
    closed = {key: closed_id for _, closed_id, key in active.asking.late}
    count(edit, active, events)
    names = _add_requests(edit, requests, closed, resumable=resumable, park=park, tail=tail)
    if park is not None and not (park.checkpoint or active.asking.parked):
        park_for_restart(edit, content)
    return edit.done(reply=names)


def answer(
    lane: Lane, run_id: str, input_request_id: str, given: Answer, *, at: Micros
) -> Transition[None]:
    """Answers an open request (R41). Raises InputClosed if it is not open."""
    edit = Edit(lane, at)
    run, item = _open_input(lane, run_id, input_request_id)
    if run is None or item is None:
        raise InputClosed.of(input_request_id, "it is closed")
    close_input(edit, run, item, InputState.ANSWERED, given)
    return edit.done(reply=None)


def expire(lane: Lane, run_id: str, input_request_id: str, *, at: Micros) -> Transition[bool]:
    """Expires a request: its default answer applies, or the run that waits for it fails (R43).

    Replies with whether it was open.
    """
    edit = Edit(lane, at)
    run, item = _open_input(lane, run_id, input_request_id)
    if run is None or item is None:
        return edit.done(reply=False)
    _expire(edit, run, item)
    return edit.done(reply=True)


def resume(lane: Lane, *, at: Micros, host: str = "") -> Transition[LaneRun | None]:
    """Continues the active run, which has all its answers, on node `host` (R41).

    Replies with the run, or None if it cannot continue.
    """
    edit = Edit(lane, at)
    return edit.done(reply=_resume(edit, host) if lane.can_resume else None)


def _open_input(
    lane: Lane, run_id: str, input_request_id: str
) -> tuple[LaneRun | None, OpenInput | None]:
    run = lane.find(run_id)
    held = () if run is None else run.asking.pending
    return run, next((one for one in held if one.input_request_id == input_request_id), None)


def _add_requests(
    edit: Edit,
    requests: tuple[InputRequest, ...],
    closed: Mapping[str, str],
    *,
    resumable: bool,
    park: Park | None,
    tail: tuple[EventBody, ...],
) -> tuple[str, ...]:
    """Adds requests to the active run, and makes it wait if one of them is open.

    `closed` maps the keys of requests that were closed a moment ago to their ids.
    """
    run = edit.emit(cast("LaneRun", edit.active), *tail)
    held = {one.key: one for one in run.asking.pending}
    stamped = [_asked_at(request, edit.at) for request in requests]
    asked = [request for request in stamped if request.question.key not in closed]
    new = [request for request in asked if request.question.key not in held]
    before = run.asking
    if len(held) + len(new) > MAX_OPEN_INPUTS or before.asked + len(new) > MAX_INPUTS:
        raise InputLimit
    held |= {request.question.key: _open_part(request) for request in new}
    for request in new:
        change = InputChange(
            request.input_request_id, run.run_id, InputState.OPEN, edit.at, request
        )
        edit.inputs.append(change)
    for request in asked:
        requested = _requested(request, held[request.question.key].input_request_id)
        run = edit.emit(run, requested)
    if (asked or park) and run.state is RunState.ACTIVE:
        run = advance(run, Trigger.ASK)
    after = before._replace(
        pending=tuple(held.values()),
        asked=before.asked + len(new),
        asks=before.asks + 1,
        resumable=resumable,
    )
    if park is not None:
        after = after._replace(parked=True, used=park.used, checkpoint=park.checkpoint)
    edit.active = run._replace(asking=after, host="" if park else run.host)
    edit.record(edit.active)
    return tuple(
        closed.get(key) or held[key].input_request_id
        for key in (request.question.key for request in requests)
    )


def _expire(edit: Edit, run: LaneRun, item: OpenInput) -> None:
    """Expires an open request. A run that waits for it fails if there is no default."""
    given = None
    if item.default_json is not None:
        given = Answer("", item.default_json, "", "default", "", "", edit.at)
    run = close_input(edit, run, item, InputState.EXPIRED, given)
    if given is None and run.state is RunState.INPUT_REQUIRED:
        run = withdraw_inputs(edit, run)
        expired = run.asking._replace(expired=item.input_request_id)
        edit.replace(run._replace(asking=expired))


def _resume(edit: Edit, host: str) -> LaneRun:
    """Makes the active run ACTIVE again: the same attempt, or one that does not count."""
    active = cast("LaneRun", edit.active)
    kept = active.asking._replace(parked=False, restarts=False)
    changes: dict[str, Any] = {"state": next_state(active.state, Trigger.RESUME), "host": host}
    if active.asking.restarts:
        attempt = active.attempt + 1
        kept = kept._replace(extra_attempts=kept.extra_attempts + 1, used=0, checkpoint="")
        changes |= {"attempt": attempt, "asking": kept, "started_at": edit.at}
        edit.active = edit.emit(active, Started(attempt), **changes)
    else:
        changes |= {"asking": kept}
        edit.active = edit.emit(active, Resumed(active.attempt), **changes)
    edit.record(edit.active)
    return edit.active


def close_input(
    edit: Edit, run: LaneRun, item: OpenInput, state: InputState, given: Answer | None = None
) -> LaneRun:
    """Closes an open request, wherever its run is."""
    left = tuple(one for one in run.asking.pending if one != item)
    late = (*run.asking.late, LateInput(state, item.input_request_id, item.key))
    edit.inputs.append(InputChange(item.input_request_id, run.run_id, state, edit.at, answer=given))
    run = run._replace(asking=run.asking._replace(pending=left, late=late))
    # While the agent emits, only its supervisor knows how many events there are.
    if run.state not in {RunState.ACTIVE, RunState.CANCELLING}:
        run = emit_late(edit, run)
    edit.replace(run)
    return run


def withdraw_inputs(edit: Edit, run: LaneRun) -> LaneRun:
    """Withdraws the open requests of a run (R42)."""
    for item in run.asking.pending:
        run = close_input(edit, run, item, InputState.WITHDRAWN)
    return run


def end_inputs(edit: Edit, run: LaneRun) -> LaneRun:
    """Withdraws what is open, and writes the events of all closed requests (R42)."""
    if run.asking is NO_INPUT or run.asking == NO_INPUT:
        return run
    late = list(run.asking.late)
    for item in run.asking.pending:
        withdrawn = InputState.WITHDRAWN
        edit.inputs.append(InputChange(item.input_request_id, run.run_id, withdrawn, edit.at))
        late.append(LateInput(withdrawn, item.input_request_id, item.key))
    run = emit_late(edit, run._replace(asking=run.asking._replace(late=tuple(late))))
    return run._replace(asking=NO_INPUT)


def count(edit: Edit, active: LaneRun, events: int, *, with_late: bool = True) -> None:
    """Sets the number of events of the active run, and writes those that are late.

    While the run waits for input, others write its events; then its lane has the number.
    """
    edit.active = active._replace(events=max(active.events, events))
    if with_late and active.asking.late:
        edit.active = emit_late(edit, edit.active)
        edit.record(edit.active)


def emit_late(edit: Edit, run: LaneRun) -> LaneRun:
    """Writes the events of closed requests."""
    bodies = [_CLOSED[state](input_id) for state, input_id, _ in run.asking.late]
    return edit.emit(run, *bodies, asking=run.asking._replace(late=()))


def _asked_at(request: InputRequest, at: Micros) -> InputRequest:
    """A request with its times."""
    timeout = request.question.timeout
    return request._replace(requested_at=at, expires_at=None if timeout is None else at + timeout)


def _open_part(request: InputRequest) -> OpenInput:
    question = request.question
    return OpenInput(request.input_request_id, question.key, question.default_json)


def _requested(request: InputRequest, input_request_id: str) -> InputRequested:
    """The event of a question; an earlier attempt may have asked it under another id."""
    question = request.question
    return InputRequested(
        input_request_id,
        question.key,
        question.kind,
        question.text,
        question.tool_name,
        question.arguments_json,
        json.dumps(question.choices),
        question.schema_json,
        request.expires_at or 0,
        question.digest,
    )
