"""The faults of a node, and random plans of them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

from proofs.crash.network import Side

NODES = 3

WORKERS = 3
"""In rounds with workers. They are numbered after the nodes."""

WORKER_LEASE = 20.0
"""Seconds that a worker keeps its run. It notices a node that vanished within 15."""


class FaultKind(StrEnum):
    """A kind of fault. The long ones outlast the lease: other nodes declare the node dead."""

    KILL = "kill"
    DRAIN = "drain"
    PAUSE = "pause"
    LONG_PAUSE = "long pause"
    CUT_STORE = "cut from store"
    LONG_CUT_STORE = "long cut from store"
    CUT_CLIENTS = "cut from clients"
    LONG_CUT_ALL = "long cut from all"
    VANISH = "vanish"
    """Killed while it is cut off: its peers get no notice."""


GAVE_UP = "gave up"
"""Not an injected fault: a node gave up because its database did not answer within the lease.
Without any fault on that node, the machine was too busy for the lease."""

ENDING = frozenset({FaultKind.KILL, FaultKind.DRAIN, FaultKind.VANISH})
"""The faults after which the node is started again."""

LOSING = frozenset(
    {
        FaultKind.KILL,
        FaultKind.LONG_PAUSE,
        FaultKind.LONG_CUT_STORE,
        FaultKind.LONG_CUT_ALL,
        FaultKind.VANISH,
    }
)
"""The faults after which another node takes over the runs."""

PAUSES = frozenset({FaultKind.PAUSE, FaultKind.LONG_PAUSE})

CUTS = {
    FaultKind.CUT_STORE: (Side.STORE,),
    FaultKind.LONG_CUT_STORE: (Side.STORE,),
    FaultKind.CUT_CLIENTS: (Side.CLIENTS,),
    FaultKind.LONG_CUT_ALL: (Side.STORE, Side.CLIENTS),
    FaultKind.VANISH: (Side.STORE, Side.CLIENTS),
}

WORKER_CUTS = frozenset({FaultKind.CUT_CLIENTS, FaultKind.LONG_CUT_ALL})
"""The faults that cut a worker off from the nodes. A long one outlasts its lease."""


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """A planned fault: its kind, the node or worker, and its duration in seconds. With `reset` a
    cut breaks connections; otherwise they fall silent."""

    node: int
    kind: FaultKind
    seconds: float
    reset: bool = False


WEIGHTS = {
    FaultKind.KILL: 5,
    FaultKind.DRAIN: 1,
    FaultKind.PAUSE: 2,
    FaultKind.LONG_PAUSE: 3,
    FaultKind.CUT_STORE: 2,
    FaultKind.LONG_CUT_STORE: 3,
    FaultKind.CUT_CLIENTS: 2,
    FaultKind.LONG_CUT_ALL: 1,
}
"""The weight of each kind in a random plan."""

BETWEEN = (1.0, 3.5)
"""Minimum and maximum of the seconds between two faults."""

TWO_AT_ONCE = 0.3
"""Probability that a fault hits two nodes."""

VANISH_SECONDS = (16.0, 24.0)
"""Seconds that a node stays away that vanished: more than a worker takes to notice."""

VANISHES = 0.5
"""How often a node vanishes in a round with workers."""

WORKER_WEIGHTS = {
    FaultKind.KILL: 4,
    FaultKind.DRAIN: 2,
    FaultKind.PAUSE: 2,
    FaultKind.LONG_PAUSE: 1,
    FaultKind.CUT_CLIENTS: 4,
    FaultKind.LONG_CUT_ALL: 2,
}
"""The weight of each kind of fault of a worker."""

BETWEEN_WORKERS = (2.0, 6.0)
"""Minimum and maximum of the seconds between two faults of workers."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan that a seed stands for: the number of clients, the seconds of load, the faults with
    their times, and the number of workers."""

    seed: str
    seconds: float
    lease: float
    hits: tuple[tuple[float, PlannedFault], ...]
    actors: int = 9
    workers: int = 0

    @classmethod
    def draw(cls, seed: str, seconds: float, lease: float, workers: int = 0) -> Plan:
        """Draws a plan."""
        rng = random.Random(seed)  # noqa: S311 - it is to repeat itself
        hits: list[tuple[float, PlannedFault]] = []
        at = rng.uniform(*BETWEEN)
        while at < seconds:
            struck = rng.sample(range(NODES), 2 if rng.random() < TWO_AT_ONCE else 1)
            hits += [(at, _draw(rng, node, lease)) for node in struck]
            at += rng.uniform(*BETWEEN)
        if workers:
            hits += _draw_workers(rng, seconds, workers)
        return cls(seed, seconds, lease, tuple(hits), workers=workers)


def _draw(rng: random.Random, node: int, lease: float) -> PlannedFault:
    kind = rng.choices(tuple(WEIGHTS), weights=tuple(WEIGHTS.values()))[0]
    if kind in ENDING or kind is FaultKind.CUT_CLIENTS:
        seconds = rng.uniform(0, 1.5) * lease
    elif kind in LOSING:
        seconds = rng.uniform(1.2, 2.5) * lease
    else:
        seconds = rng.uniform(0.1, 0.5) * lease
    return PlannedFault(node, kind, seconds, reset=rng.random() < 0.5)


def _draw_workers(
    rng: random.Random, seconds: float, workers: int
) -> list[tuple[float, PlannedFault]]:
    """The faults of workers, and those of nodes that concern workers only."""
    hits: list[tuple[float, PlannedFault]] = []
    at = rng.uniform(*BETWEEN_WORKERS)
    while at < seconds:
        hits.append((at, _draw_worker(rng, NODES + rng.randrange(workers))))
        at += rng.uniform(*BETWEEN_WORKERS)
    if rng.random() < VANISHES:
        away = rng.uniform(*VANISH_SECONDS)
        hits.append(
            (rng.uniform(0, seconds), PlannedFault(rng.randrange(NODES), FaultKind.VANISH, away))
        )
    return hits


def _draw_worker(rng: random.Random, worker: int) -> PlannedFault:
    kind = rng.choices(tuple(WORKER_WEIGHTS), weights=tuple(WORKER_WEIGHTS.values()))[0]
    if kind in ENDING:
        seconds = rng.uniform(0, 3)
    elif kind in {FaultKind.LONG_PAUSE, FaultKind.LONG_CUT_ALL}:
        seconds = rng.uniform(1.0, 1.4) * WORKER_LEASE
    else:
        seconds = rng.uniform(0.1, 0.4) * WORKER_LEASE
    return PlannedFault(worker, kind, seconds, reset=rng.random() < 0.5)
