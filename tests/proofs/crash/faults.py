"""What may happen to a node, and plans of it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

from proofs.crash.network import Side

NODES = 3


class FaultKind(StrEnum):
    """What may happen to a node. The others take it for lost in what is called long."""

    KILL = "kill"
    DRAIN = "drain"
    PAUSE = "pause"
    LONG_PAUSE = "long pause"
    CUT_STORE = "cut from store"
    LONG_CUT_STORE = "long cut from store"
    CUT_CLIENTS = "cut from clients"
    LONG_CUT_ALL = "long cut from all"


GAVE_UP = "gave up"
"""No fault of ours: a node took itself for lost, as it heard nothing of its database in time. Where
nothing had happened to it, the machine was too busy for the lease."""

ENDING = frozenset({FaultKind.KILL, FaultKind.DRAIN})
"""The node is started anew after these."""

LOSING = frozenset(
    {
        FaultKind.KILL,
        FaultKind.LONG_PAUSE,
        FaultKind.LONG_CUT_STORE,
        FaultKind.LONG_CUT_ALL,
    }
)
"""The runs of the node are another's after these."""

PAUSES = frozenset({FaultKind.PAUSE, FaultKind.LONG_PAUSE})

CUTS = {
    FaultKind.CUT_STORE: (Side.STORE,),
    FaultKind.LONG_CUT_STORE: (Side.STORE,),
    FaultKind.CUT_CLIENTS: (Side.CLIENTS,),
    FaultKind.LONG_CUT_ALL: (Side.STORE, Side.CLIENTS),
}


@dataclass(frozen=True, slots=True)
class Hit:
    """A fault to be: what, to which node, and for how many seconds. `reset` breaks connections
    that are cut, rather than have them fall silent."""

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
"""How often each of them is drawn."""

BETWEEN = (1.0, 3.5)
"""Seconds between one fault and the next, at least and at most."""

TWO_AT_ONCE = 0.3
"""How often the next fault is that of two nodes."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a seed stands for: so many clients for so many seconds, and at which of them what
    happens."""

    seed: str
    seconds: float
    lease: float
    hits: tuple[tuple[float, Hit], ...]
    actors: int = 9

    @classmethod
    def draw(cls, seed: str, seconds: float, lease: float) -> Plan:
        """Draws a plan."""
        rng = random.Random(seed)  # noqa: S311 - it is to repeat itself
        hits: list[tuple[float, Hit]] = []
        at = rng.uniform(*BETWEEN)
        while at < seconds:
            struck = rng.sample(range(NODES), 2 if rng.random() < TWO_AT_ONCE else 1)
            hits += [(at, _draw(rng, node, lease)) for node in struck]
            at += rng.uniform(*BETWEEN)
        return cls(seed, seconds, lease, tuple(hits))


def _draw(rng: random.Random, node: int, lease: float) -> Hit:
    kind = rng.choices(tuple(WEIGHTS), weights=tuple(WEIGHTS.values()))[0]
    if kind in ENDING or kind is FaultKind.CUT_CLIENTS:
        seconds = rng.uniform(0, 1.5) * lease
    elif kind in LOSING:
        seconds = rng.uniform(1.2, 2.5) * lease
    else:
        seconds = rng.uniform(0.1, 0.5) * lease
    return Hit(node, kind, seconds, reset=rng.random() < 0.5)
