"""Compares every pair of a lane's shape and a command with the outcome in `lane_pairs.txt`.

A command on a reservation uses that of run `n`, and reserves it first if necessary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from proofs.lanecheck.commands import (
    DISPATCH,
    FAIL_WAITING,
    NODE_LOST,
    REMOVE,
    RESUME,
    Command,
    Verb,
    accept,
    adopt,
    answer,
    ask,
    cancel,
    drain,
    expire,
    finish,
    hand_back,
    hand_over,
    reserve,
    update,
)
from proofs.lanecheck.shapes import SHAPES, lane_of, outcome, picture
from proofs.sim.explore import step
from runlane_server.core.model import CancelScope, WhenBusy
from runlane_server.core.transition import Lane
from runlane_server.core.update import Place

TABLE_FILE = Path(__file__).with_name("lane_pairs.txt")


def _on_active(make: Callable[[str, int], Command], *, late: int = 0) -> Callable[[Lane], Command]:
    """A command of the active run's supervisor; `late` is added to the number of the attempt."""

    def command(lane: Lane) -> Command:
        if lane.active is None:
            return make("nobody", 1)
        return make(lane.active.run_id, lane.active.attempt + late)

    return command


def _always(command: Command) -> Callable[[Lane], Command]:
    return lambda _: command


def _first_of_all(lane: Lane) -> Command:
    """A cancel of one run: the folded, else the last waiting, else the active one, else `n`."""
    active = () if lane.active is None else (lane.active,)
    runs = (*active, *lane.waiting, *lane.folded)
    return cancel(CancelScope.RUN, runs[-1].run_id if runs else "n")


def _on_last(changes: Mapping[str, Any]) -> Callable[[Lane], Command]:
    """An update of the last waiting run, or of the active one."""

    def command(lane: Lane) -> Command:
        active = () if lane.active is None else (lane.active,)
        runs = (*active, *lane.waiting)
        return update(runs[-1].run_id if runs else "nobody", **changes)

    return command


def _ask_and_park(run_id: str, attempt: int) -> Command:
    return ask(run_id, attempt, park=True)


def _ask_to_restart(run_id: str, attempt: int) -> Command:
    return ask(run_id, attempt, restart=True)


def _answer(run_id: str, _: int) -> Command:
    return answer(run_id)


def _expire(run_id: str, _: int) -> Command:
    return expire(run_id)


def _finish_failed(run_id: str, attempt: int) -> Command:
    return finish(run_id, attempt, ok=False)


COMMANDS: Mapping[str, Callable[[Lane], Command]] = {
    "reserve": _always(reserve("m")),
    "release": _always(Command(Verb.RELEASE, "n")),
    "accept without reservation": _always(accept("m")),
    **{
        f"accept {when_busy}{', allow_missing' * allowed}": _always(
            replace(accept("n", when_busy), allow_missing=bool(allowed))
        )
        for when_busy, allowed in product(WhenBusy, (0, 1))
    },
    "dispatch": _always(DISPATCH),
    "cancel session": _always(cancel()),
    "cancel active": _always(cancel(CancelScope.ACTIVE)),
    "cancel waiting": _always(cancel(CancelScope.WAITING)),
    "cancel run": _first_of_all,
    "cancel another run": _always(cancel(CancelScope.RUN, "nobody")),
    "drain_for_step": _on_active(drain),
    "ask": _on_active(ask),
    "ask and park": _on_active(_ask_and_park),
    "ask to restart": _on_active(_ask_to_restart),
    "ask of another attempt": _on_active(ask, late=1),
    "answer": _on_active(_answer),
    "expire": _on_active(_expire),
    "resume": _always(RESUME),
    "finish ok": _on_active(finish),
    "finish failed": _on_active(_finish_failed),
    "finish of another attempt": _on_active(finish, late=1),
    "node_lost": _always(NODE_LOST),
    "node_lost, last attempt": _always(NODE_LOST),
    "hand_over": _on_active(hand_over),
    "hand_over, last attempt": _on_active(hand_over),
    "hand_over of another attempt": _on_active(hand_over, late=1),
    "hand_back": _on_active(hand_back),
    "hand_back, last attempt": _on_active(hand_back),
    "hand_back of another attempt": _on_active(hand_back, late=1),
    "adopt": _on_active(adopt),
    "adopt another attempt": _on_active(adopt, late=1),
    "update to first": _on_last({"place": Place.FIRST}),
    "update to interrupt": _on_last({"sends": WhenBusy.INTERRUPT}),
    "update of an old revision": _on_last({"edits": True, "revision": 7}),
    "fail_waiting": _always(FAIL_WAITING),
    "remove": _always(REMOVE),
}


def _read() -> dict[tuple[str, str], str]:
    """The table: `= shape: picture`, and below it `command -> outcome`."""
    table: dict[tuple[str, str], str] = {}
    shape = ""
    for line in TABLE_FILE.read_text().splitlines():
        if line.startswith("= "):
            shape, _, seen = line.removeprefix("= ").partition(": ")
            table[shape, ""] = seen
        elif line and not line.startswith("#"):
            command, arrow, wanted = (word.strip() for word in line.partition(" -> "))
            assert arrow, line
            assert (shape, command) not in table, f"{shape} and {command} are listed twice"
            table[shape, command] = wanted
    return table


PAIRS = _read()


def _lane_for(shape: str, command: str) -> Lane:
    lane = lane_of(shape)
    held = "n" in {reservation.token for reservation in lane.reservations}
    if command.startswith("accept ") and not held:
        lane = reserve("n").apply(lane).lane
    if command.endswith("last attempt") and lane.active is not None:
        lane = lane._replace(active=lane.active._replace(max_attempts=lane.active.attempt))
    return lane


def _outcome(lane: Lane, command: Command) -> str:
    made = step(lane, command)
    if made is None:
        refusal = command.refusal(lane)
        assert refusal is not None
        return refusal.__name__
    return outcome(lane, made)


def test_the_table_lists_every_pair() -> None:
    assert set(PAIRS) == set(product(SHAPES, ("", *COMMANDS)))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_the_lane_in_the_table(shape: str) -> None:
    assert picture(lane_of(shape)) == PAIRS[shape, ""]


@pytest.mark.parametrize(("shape", "name"), list(product(SHAPES, COMMANDS)))
def test_a_command_has_the_outcome_in_the_table(shape: str, name: str) -> None:
    lane = _lane_for(shape, name)
    assert _outcome(lane, COMMANDS[name](lane)) == PAIRS[shape, name]
