"""Searches all interleavings of lane commands, breadth first, and checks every step.

    cd tests && PYTHONPATH=../server python -m proofs.sim.explore --depth 12 --runs 3

A lane counts as seen if it differs from an earlier one only by names, absolute numbers and counts
of events: no rule depends on those. So the number of lanes with a bounded number of runs is finite,
and with enough depth the search is complete; the report says when it is.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from proofs.lanecheck.commands import (
    DISPATCH,
    DISPATCH_ELSEWHERE,
    DISPATCH_LATER,
    ELSEWHERE,
    EMPTY,
    FAIL_OTHER,
    FAIL_WAITING,
    FATAL,
    NOBODY,
    NODE_LOST,
    OTHER,
    POLICY,
    REMOVE,
    RESUME,
    RESUME_ELSEWHERE,
    Command,
    Verb,
    adopt,
    answer,
    ask,
    at_work,
    cancel,
    drain,
    expire,
    finish,
    hand_back,
    hand_over,
    live,
    live_ids,
    node_lost,
    reserve,
    stored,
    update,
)
from proofs.lanecheck.invariants import check, require
from runlane_server.core import lane as lane_rules
from runlane_server.core.model import CancelScope, WhenBusy
from runlane_server.core.transition import Lane, LaneRun, Reservation, Transition
from runlane_server.core.update import Place

State = Hashable
"""A world with names and absolute numbers normalised."""


@dataclass(frozen=True, slots=True)
class World:
    """A lane, the ended runs that are being accepted again, and the number of names used."""

    lane: Lane = EMPTY
    ended: frozenset[str] = frozenset()
    named: int = 0


@dataclass(frozen=True, slots=True)
class Bounds:
    """The scope of a search.

    Maximum numbers of runs and reservations together, of reservations, and of waiting runs; and
    whether there are two agents, two nodes, questions to people, retries of failed attempts, and
    updates of waiting runs.
    Each of these multiplies the number of lanes.
    """

    runs: int = 3
    reservations: int = 2
    waiting: int = 2
    agents: bool = True
    nodes: bool = True
    asks: bool = True
    retries: bool = True
    updates: bool = False

    @classmethod
    def plain(cls, **more: Any) -> Bounds:
        """Two runs without any of what multiplies; `more` adds to it."""
        none = cls(2, 2, 1, agents=False, nodes=False, asks=False, retries=False)
        return replace(none, **more)


SMALL = Bounds()

UPDATED = Bounds.plain(runs=3, waiting=2, reservations=1, updates=True)
"""A queue whose runs are updated."""


@dataclass(slots=True)
class Report:
    """The result of a search. `complete`: no state lies beyond the depth."""

    depth: int = 0
    states: int = 1
    transitions: int = 0
    refusals: int = 0
    complete: bool = False
    seconds: float = 0.0
    verbs: set[Verb] = field(default_factory=set)

    def __str__(self) -> str:
        return (
            f"depth {self.depth}: {self.states} states, {self.transitions} transitions, "
            f"{self.refusals} refusals, {self.seconds:.1f} s"
            f"{', complete' if self.complete else ''}"
        )


class Counterexample(AssertionError):
    """The shortest way to a broken rule."""

    def __init__(self, rule: str, path: list[Command]) -> None:
        super().__init__("\n  ".join([rule, *map(str, path)]))
        self.rule = rule
        self.path = path


def explore(depth: int, bounds: Bounds = SMALL, rules: ModuleType = lane_rules) -> Report:
    """Applies every command to every lane that fewer than `depth` commands lead to.

    Raises Counterexample at the first step that breaks a rule.
    """
    began = time.perf_counter()
    report = Report()
    start = World()
    came: dict[State, tuple[State, Command] | None] = {canonical(start): None}
    frontier = [start]
    while frontier and report.depth < depth:
        beyond: list[World] = []
        for world in frontier:
            here = canonical(world)
            for command in commands(world, bounds):
                try:
                    made = step(world.lane, command, rules)
                except Exception as error:
                    path = [*_path_to(here, came), command]
                    raise Counterexample(str(error) or repr(error), path) from error
                if made is None:
                    report.refusals += 1
                    continue
                report.transitions += 1
                report.verbs.add(command.verb)
                after = _world_after(world, command, made)
                there = canonical(after)
                if there not in came:
                    came[there] = (here, command)
                    beyond.append(after)
        frontier = beyond
        report.depth += 1
        report.states = len(came)
    report.complete = not frontier
    report.seconds = time.perf_counter() - began
    return report


def step(lane: Lane, command: Command, rules: ModuleType = lane_rules) -> Transition[Any] | None:
    """Applies a command and checks the result; None if it was refused, as it had to be."""
    wanted = command.refusal(lane)
    try:
        made = command.apply(lane, rules)
    except Exception as error:  # noqa: BLE001 - it has to be the one that is wanted
        require(wanted is not None and isinstance(error, wanted), f"no reason to refuse: {error!r}")
        return None
    require(wanted is None, f"{command} has to be refused")
    check(lane, command, made)
    return made


def _world_after(world: World, command: Command, made: Transition) -> World:
    ended = world.ended | {complete.run_id for complete in made.completes}
    lane = stored(world.lane, made)
    repeated = frozenset(held.run_id for held in lane.reservations if held.run_id in ended)
    return World(lane, repeated, world.named + (command.verb is Verb.RESERVE))


def _path_to(state: State, came: dict[State, tuple[State, Command] | None]) -> list[Command]:
    path: list[Command] = []
    while (leg := came[state]) is not None:
        state, command = leg
        path.append(command)
    return path[::-1]


# --- The commands -------------------------------------------------------------------------------


def commands(world: World, bounds: Bounds) -> Iterator[Command]:
    """All commands that can make a difference in a world, including those that are refused."""
    lane = world.lane
    yield from _accepts(world, bounds)
    yield from (DISPATCH, NODE_LOST, FAIL_WAITING, REMOVE)
    yield from [DISPATCH_LATER] * bounds.retries
    yield from [FAIL_OTHER] * bounds.agents
    yield from map(cancel, (CancelScope.SESSION, CancelScope.ACTIVE, CancelScope.WAITING))
    names = dict.fromkeys([*sorted(live_ids(lane)), *(held.run_id for held in lane.reservations)])
    for run_id in (*names, "unknown"):
        yield cancel(CancelScope.RUN, run_id)
    if bounds.nodes:
        yield from (DISPATCH_ELSEWHERE, RESUME_ELSEWHERE, *map(node_lost, ("", ELSEWHERE)))
    if lane.active is not None:
        run_id, attempt = lane.active.run_id, lane.active.attempt
        yield drain(run_id, attempt)
        yield finish(run_id, attempt)
        yield finish(run_id, attempt, ok=False)
        if bounds.retries:
            yield finish(run_id, attempt, ok=False, error=FATAL)
        yield hand_over(run_id, attempt)
        yield hand_over(run_id, attempt + 1)
        yield finish(run_id, attempt + 1)
        yield drain(run_id, attempt + 1)
        yield hand_back(run_id, attempt)
        if bounds.nodes:
            yield from _adopts(lane.active)
        if bounds.asks:
            yield from _asks(lane.active)
    if bounds.updates:
        yield from _updates(lane)
    if bounds.asks:
        yield from _answers(lane)
    for run in lane.waiting[:1]:
        yield finish(run.run_id, run.attempt)


def _updates(lane: Lane) -> Iterator[Command]:
    yield update("unknown", edits=True)
    for run in live(lane):
        run_id = run.run_id
        yield update(run_id, edits=True)
        yield update(run_id, edits=True, revision=run.revision)
        yield update(run_id, edits=True, revision=run.revision + 1)
        if run.last_update:
            yield update(run_id, place=Place.FIRST, repeated=True)
            yield update(run_id, place=Place.FIRST, repeated=True, revision=run.revision - 1)
        for sends in (WhenBusy.QUEUE, WhenBusy.FOLD, WhenBusy.INTERRUPT):
            yield update(run_id, sends=sends)
        yield update(run_id, place=Place.FIRST)
        yield update(run_id, place=Place.LAST, edits=True)
        for other in lane.waiting:
            yield update(run_id, place=Place.BEFORE, anchor=other.run_id)
            yield update(run_id, place=Place.AFTER, anchor=other.run_id)
        yield update(run_id, place=Place.AFTER, anchor="unknown")


def _adopts(active: LaneRun) -> Iterator[Command]:
    run_id, attempt = active.run_id, active.attempt
    yield adopt(run_id, attempt, host="")
    yield adopt(run_id, attempt)
    yield adopt(run_id, attempt + 1)
    # A node recovers what another one has lost, perhaps a moment before.
    for host in ("", ELSEWHERE):
        yield adopt(run_id, attempt, host=host, lost_with="")
        yield adopt(run_id, attempt, host=host, lost_with=ELSEWHERE)
    # The supervisor on the node where the run was before it was adopted.
    late = "" if active.host else ELSEWHERE
    for command in (drain, finish, hand_over, hand_back):
        yield replace(command(run_id, attempt), host=late)


def _answers(lane: Lane) -> Iterator[Command]:
    yield RESUME
    for run in live(lane):
        for key in ("k", "unknown"):
            yield answer(run.run_id, key)
            yield expire(run.run_id, key)


def _asks(active: LaneRun) -> Iterator[Command]:
    """Every kind of question, under one key: an attempt asks again what an earlier one asked."""
    run_id, attempt = active.run_id, active.attempt
    if active.asking.asks:
        yield ask(run_id, attempt, repeated=True)
        yield ask(run_id, attempt, park=True, repeated=True)
    yield ask(run_id, attempt)
    yield ask(run_id, attempt, resumable=True)
    yield ask(run_id, attempt, has_default=True)
    yield ask(run_id, attempt, park=True)
    yield ask(run_id, attempt, restart=True)
    yield ask(run_id, attempt + 1)


def _accepts(world: World, bounds: Bounds) -> Iterator[Command]:
    lane = world.lane
    token = f"t{world.named}"
    if len(lane.reservations) < bounds.reservations:
        if len(live(lane)) + len(lane.reservations) < bounds.runs:
            yield reserve(token, f"r{world.named}")
        for run_id in sorted(live_ids(lane) | {held.run_id for held in lane.reservations}):
            yield reserve(token, run_id)
    for held in lane.reservations:
        yield Command(Verb.RELEASE, token=held.token)
        yield reserve(held.token, held.run_id)
        # The store refuses a known run id; the lane does not contain ended runs.
        if held.run_id not in world.ended:
            yield from _accepts_of(held, lane, bounds)
    yield _accept("none", "none", WhenBusy.QUEUE, bounds)


def _accepts_of(held: Reservation, lane: Lane, bounds: Bounds) -> Iterator[Command]:
    """Every accept with a reservation."""
    token, run_id = held.token, held.run_id
    for when_busy in WhenBusy:
        yield _accept(token, run_id, when_busy, bounds)
    if bounds.agents:
        # Another agent makes a difference to a fold, before it and behind it.
        for when_busy in (WhenBusy.QUEUE, WhenBusy.FOLD):
            yield _accept(token, run_id, when_busy, bounds, agent=OTHER)
        yield _accept(token, run_id, WhenBusy.INTERRUPT, bounds, agent=NOBODY)
    for expected in filter(None, (at_work(lane), run_id)):
        yield replace(_accept(token, run_id, WhenBusy.INTERRUPT, bounds), expected=expected)
    if not lane.exists:
        yield _accept(token, run_id, WhenBusy.QUEUE, bounds, missing=False)


def _accept(
    token: str,
    run_id: str,
    when_busy: WhenBusy,
    bounds: Bounds,
    *,
    missing: bool = True,
    agent: str = "",
) -> Command:
    return Command(
        Verb.ACCEPT,
        token=token,
        run_id=run_id,
        when_busy=when_busy,
        allow_missing=missing,
        max_waiting=bounds.waiting,
        agent=agent,
        retry=POLICY if bounds.retries else None,
    )


# --- Equivalent worlds --------------------------------------------------------------------------


def canonical(world: World) -> State:
    """The world with runs and turns named by their position in accept order."""
    lane = world.lane
    runs = sorted(live(lane), key=lambda run: run.accept_seq)
    names = {run.run_id: n for n, run in enumerate(runs)}
    for held in lane.reservations:
        names.setdefault(held.run_id, len(names))
    turns = {turn: n for n, turn in enumerate(sorted({0, *(run.turn for run in runs)}))}

    def seen(run: LaneRun) -> State:
        into = names.get(run.folded_into)
        covered = bool(run.cancel_reason)
        name, turn = names[run.run_id], turns[run.turn]
        held = run.asking
        asked = (
            tuple((one.key, one.default_json is None) for one in held.pending),
            tuple((state, key) for state, _, key in held.late),
            *(bool(held.expired), held.parked, held.restarts, held.resumable),
        )
        attempt = run.attempt - held.extra_attempts
        key = name, run.state, run.when_busy, run.agent, attempt, turn, into, covered
        return (*key, run.host, asked, run.failures, run.not_before)

    return (
        lane.exists,
        None if lane.active is None else seen(lane.active),
        tuple(map(seen, lane.folded)),
        tuple(map(seen, lane.waiting)),
        tuple(
            (names[held.run_id], held.covered, held.run_id in world.ended)
            for held in lane.reservations
        ),
    )


def main() -> None:
    """Searches to a depth; the exit code is 1 if a rule is broken."""
    parser = argparse.ArgumentParser(prog="proofs.sim.explore", description=__doc__)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--runs", type=int, default=SMALL.runs)
    parser.add_argument("--reservations", type=int, default=SMALL.reservations)
    parser.add_argument("--waiting", type=int, default=SMALL.waiting)
    parser.add_argument("--updates", action="store_true")
    told = parser.parse_args()
    bounds = Bounds(told.runs, told.reservations, told.waiting, updates=told.updates)
    try:
        report = explore(told.depth, bounds)
    except Counterexample as found:
        sys.exit(str(found))
    sys.stdout.write(f"{report}\n")


if __name__ == "__main__":
    main()
