"""Accepts: reservations, and how a run enters its lane (R1 to R6, R27)."""

from __future__ import annotations

from itertools import takewhile

from runlane_server.core.agents import ONE_AGENT, AgentNames
from runlane_server.core.errors import (
    ActiveRunChanged,
    IllegalCommand,
    QueueFull,
    SessionBeingDeleted,
    SessionBusy,
    SessionNotFound,
)
from runlane_server.core.lane.cancelling import cancel_active, cancel_waiting
from runlane_server.core.lane.edit import Edit
from runlane_server.core.lane.states import Trigger, next_state
from runlane_server.core.model import Accepted, Micros, RunEvent, RunRequest, WhenBusy
from runlane_server.core.transition import Lane, LaneRun, Reservation, RunChange, Transition


def reserve(lane: Lane, token: str, run_id: str) -> Transition[None]:
    """Begins an accept: the session is busy from now on, and a cancel covers it (R6, R8, R10).

    If a receipt already lists the run id, for another accept of it, the new one is covered too.
    """
    if any(reservation.token == token for reservation in lane.reservations):
        raise IllegalCommand(f"reservation {token} exists already")
    same_run = (held for held in lane.reservations if held.run_id == run_id)
    covered = next((held for held in same_run if held.covered), None)
    reservation = covered._replace(token=token) if covered else Reservation(token, run_id)
    return Transition(lane._replace(reservations=(*lane.reservations, reservation)))


def release(lane: Lane, token: str) -> Transition[None]:
    """Ends a reservation; does nothing if it has ended already (R6)."""
    return Transition(lane._replace(reservations=_without(token, lane.reservations)))


def _without(token: str, reservations: tuple[Reservation, ...]) -> tuple[Reservation, ...]:
    return tuple([held for held in reservations if held.token != token])


def accept(
    lane: Lane,
    request: RunRequest,
    *,
    at: Micros,
    token: str,
    max_waiting: int,
    allow_missing: bool = False,
    agents: AgentNames = ONE_AGENT,
) -> Transition[LaneRun]:
    """Turns a reservation into a run. Replies with it, or with the run that already has this id.

    Raises SessionNotFound (R2), SessionBeingDeleted, AgentNotFound and PermissionDenied (R31),
    ActiveRunChanged, SessionBusy (REJECT, R27), QueueFull, and IllegalCommand if the reservation
    does not exist.
    """
    held = next((held for held in lane.reservations if held.token == token), None)
    if held is None:
        raise IllegalCommand(f"there is no reservation {token}")
    edit = Edit(lane, at)
    edit.reservations = _without(token, edit.reservations)
    known = lane.find(request.run_id)
    if known is not None:
        return edit.done(reply=known)
    if not (lane.exists or allow_missing):
        raise SessionNotFound.of(lane.key.session_id)
    if lane.is_being_removed:
        raise SessionBeingDeleted.of(lane.key.session_id)
    agent = agents.choose(request.agent, lane.agent)
    if request.expected_active not in {"", lane.active_run_id}:
        raise ActiveRunChanged.of(lane.key.session_id, request.expected_active, lane.active_run_id)
    _check_room(lane, held, request, max_waiting=max_waiting)
    if request.when_busy is WhenBusy.INTERRUPT and not held.covered:
        cancel_active(edit, "interrupted by " + request.run_id)
    run = _enter(edit, request, agent)
    if held.covered:
        cancel_waiting(edit, [run], held.cancel_reason)
    return edit.done(reply=edit.current(run))


def _check_room(lane: Lane, held: Reservation, request: RunRequest, *, max_waiting: int) -> None:
    behind_another = lane.active is not None or bool(lane.waiting)
    # Only earlier reservations count: of a burst of accepts with REJECT, one is accepted.
    earlier = takewhile(lambda other: other.token != held.token, lane.reservations)
    beaten = any(other.run_id != held.run_id for other in earlier)
    if request.when_busy is WhenBusy.REJECT and (behind_another or beaten):
        raise SessionBusy(f"session {lane.key.session_id!r} has work")
    if behind_another and len(lane.waiting) >= max_waiting:
        raise QueueFull(
            f"session {lane.key.session_id!r} is at its limit of {max_waiting} waiting runs"
        )


def _enter(edit: Edit, request: RunRequest, agent: str) -> LaneRun:
    """Adds a new run to the lane: at the end, or at the head with INTERRUPT."""
    waiting = edit.waiting
    seq = edit.accept_seq + 1
    at_head = request.when_busy is WhenBusy.INTERRUPT
    index = 0 if at_head else len(waiting)
    first = edit.active is None and index == 0
    run = LaneRun(
        run_id=request.run_id,
        accept_seq=seq,
        state=next_state(None, Trigger.ENTER if first else Trigger.WAIT),
        when_busy=request.when_busy,
        accepted_at=edit.at,
        rank=0,
        timeout=request.timeout,
        max_attempts=request.max_attempts,
        trace=request.trace,
        events=1,
        retry=request.retry,
        agent=agent,
    )
    edit.events.append(RunEvent(run.run_id, 1, edit.at, Accepted(seq)))
    edit.accept_seq = seq
    edit.changes[run.run_id] = RunChange(run, request)
    edit.insert(index, [run])
    return edit.latest(run)
