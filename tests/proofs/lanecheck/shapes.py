"""The shapes a lane can have, each with the shortest way to it, and a picture of a lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from proofs.lanecheck.commands import (
    DISPATCH,
    EMPTY,
    NODE_LOST,
    POLICY,
    Command,
    accept,
    answer,
    ask,
    cancel,
    drain,
    expire,
    finish,
    live,
    reserve,
    stored,
)
from proofs.lanecheck.invariants import check
from runlane_server.core.input import NO_INPUT
from runlane_server.core.model import CancelScope, WhenBusy
from runlane_server.core.transition import Lane, LaneRun, Receipt, Transition


def enter(run_id: str, when_busy: WhenBusy = WhenBusy.QUEUE, *, agent: str = "") -> list[Command]:
    """A reservation and its accept."""
    return [reserve(run_id), accept(run_id, when_busy, agent=agent)]


_FOLD, _INTERRUPT = WhenBusy.FOLD, WhenBusy.INTERRUPT
_IDLE = [*enter("x"), DISPATCH, finish("x")]
_ACTIVE = [*enter("a"), DISPATCH]
_FOLDED = [*_ACTIVE, *enter("f", _FOLD), drain("a")]
_RETRIED_FOLD = [*enter("g", _FOLD), DISPATCH, NODE_LOST]
_ACTIVE_RETRIED = [reserve("a"), replace(accept("a"), retry=POLICY), DISPATCH]
_BACKING_OFF = [*_ACTIVE_RETRIED, finish("a", ok=False)]
_ASKED = [*_ACTIVE, ask("a")]
_CANCEL_ACTIVE = cancel(CancelScope.ACTIVE)

SHAPES: Mapping[str, Sequence[Command]] = {
    "missing": [],
    "idle": _IDLE,
    "reserved": [*_IDLE, reserve("n")],
    "covered reservation": [*_IDLE, reserve("n"), cancel()],
    "waiting for a slot": enter("a"),
    "waiting for a slot + queued": [*enter("a"), *enter("b")],
    "active": _ACTIVE,
    "active + covered reservation": [*_ACTIVE, reserve("n"), cancel(CancelScope.WAITING)],
    "active + queued": [*_ACTIVE, *enter("b"), *enter("c")],
    "active + fold waiting": [*_ACTIVE, *enter("b"), *enter("f", _FOLD)],
    "active + folded": _FOLDED,
    "active + folded + queued": [*_FOLDED, *enter("b")],
    "cancelling": [*_ACTIVE, _CANCEL_ACTIVE],
    "cancelling + queued": [*_ACTIVE, *enter("b"), _CANCEL_ACTIVE],
    "cancelling + fold waiting": [*_ACTIVE, *enter("f", _FOLD), _CANCEL_ACTIVE],
    "cancelling + folded": [*_FOLDED, _CANCEL_ACTIVE],
    "interrupted": [*_ACTIVE, *enter("b"), *enter("i", _INTERRUPT)],
    "retried": [*_ACTIVE, *enter("b"), NODE_LOST],
    "retried + folded": [*_FOLDED, *enter("b"), NODE_LOST],
    "active again": [*_ACTIVE, NODE_LOST, DISPATCH],
    "backing off": _BACKING_OFF,
    "backing off + queued": [*_ACTIVE_RETRIED, *enter("b"), finish("a", ok=False)],
    "input required": _ASKED,
    "input required + folded + queued": [*_FOLDED, *enter("b"), ask("a")],
    "input required, resumable": [*_ACTIVE, ask("a", resumable=True)],
    "answered": [*_ASKED, *enter("b"), answer("a")],
    "expired": [*_ASKED, expire("a")],
    "parked": [*_ACTIVE, *enter("b"), ask("a", park=True)],
    "parked to restart": [*_ACTIVE, ask("a", resumable=True), NODE_LOST],
    "asked to restart": [*_FOLDED, *enter("b"), ask("a", restart=True)],
    "active again + open request": [*_ASKED, NODE_LOST, DISPATCH],
    "active again + late answer": [*_ASKED, NODE_LOST, DISPATCH, answer("a")],
    "retried behind another": [*_RETRIED_FOLD, *enter("i", _INTERRUPT), DISPATCH],
}


def lane_of(shape: str) -> Lane:
    """The lane of a shape, each step on the way checked."""
    lane = EMPTY
    for command in SHAPES[shape]:
        made = command.apply(lane)
        check(lane, command, made)
        lane = stored(lane, made)
    return lane


def picture(lane: Lane) -> str:
    """A lane in one line: the active run (with the folded ones), the waiting, [reservations].

    A covered reservation has an exclamation mark.
    """
    words: list[str] = []
    if lane.active is not None:
        folded = ",".join(run.run_id for run in lane.folded)
        words.append(f"{lane.active.run_id}:{lane.active.state}{folded and f'({folded})'}")
    words += (f"?{run.run_id}{_asked(run)}" for run in live(lane) if run.asking != NO_INPUT)
    words += (f"{run.run_id}:{run.state}" for run in lane.waiting)
    words += (f"[{held.run_id}{'!' * held.covered}]" for held in lane.reservations)
    return " ".join(words) or ("idle" if lane.exists or lane.accept_seq else "missing")


def _asked(run: LaneRun) -> str:
    """The input of a run: open requests, closed ones without their event, and its next step."""
    held = run.asking
    words = [one.key for one in held.pending]
    words += (f"{state}:{key}" for state, _, key in held.late)
    words += ["expired"] * bool(held.expired) + ["parked"] * held.parked
    words += ["restarts"] * held.restarts + [f"+{held.extra_attempts}"] * bool(held.extra_attempts)
    return f"({' '.join(words)})"


def outcome(before: Lane, made: Transition) -> str:
    """A transition in one line: `same` or the picture, what ended, and what was replied."""
    words = ["same" if made.lane == before else picture(made.lane)]
    if made.completes:
        words.append("ended " + " ".join(f"{end.run_id}:{end.state}" for end in made.completes))
    if isinstance(made.reply, Receipt):
        covered = (f"{run.run_id}:{run.state}" for run in made.reply.cancelled)
        words.append("receipt " + (" ".join(covered) or "empty"))
    return "; ".join(words)
