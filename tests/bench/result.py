"""What a benchmark finds out: rows, and the points of curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """Something measured, once a round: the value and the shares of their cores that both took."""

    value: float
    server_cpu: float = 0.0
    load_cpu: float = 0.0


@dataclass(frozen=True, slots=True)
class Budget:
    """What is asked for. `at_most`: less is better."""

    limit: float
    stretch: float | None = None
    at_most: bool = False

    def met(self, value: float) -> bool:
        """Whether the value keeps it."""
        return value <= self.limit if self.at_most else value >= self.limit

    def stretched(self, value: float) -> bool:
        """Whether it does better than was asked for."""
        if self.stretch is None:
            return False
        return value <= self.stretch if self.at_most else value >= self.stretch


@dataclass(slots=True)
class Row:
    """A line of the table. `judged`, one a round, is what the budget is about.

    `ours` and `peer` are absolute, in `unit`; `peer` is what `ours` is set against.
    """

    name: str
    title: str
    unit: str
    judged: list[float]
    ours: list[Figure]
    peer: list[Figure] = field(default_factory=list)
    budget: Budget | None = None
    judged_unit: str = ""
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Whether the budget is kept."""
        if self.budget is None:
            return ""
        value = median(self.judged)
        if self.budget.stretched(value):
            return "stretch"
        return "pass" if self.budget.met(value) else "SHORT"

    @property
    def load_bound(self) -> bool:
        """Whether the load was what could not go faster: the figure is then a lower bound."""
        return any(f.load_cpu > 0.95 and f.server_cpu < 0.9 for f in (*self.ours, *self.peer))


@dataclass(slots=True)
class Curve:
    """How a cost grows: `points` are (how many, microseconds of the server's core, a second)."""

    name: str
    title: str
    across: str
    cost: str
    points: list[tuple[int, float, float]]


@dataclass(slots=True)
class Results:
    """All that was measured in one go."""

    about: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, found: Sequence[Row | Curve]) -> None:
        """Adds what one measurement has found."""
        for one in found:
            if isinstance(one, Row):
                self.rows.append(one)
            else:
                self.curves.append(one)

    def write(self, path: Path) -> None:
        """Writes them as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1))


def read(path: Path) -> Results:
    """Results as they were written."""
    said = json.loads(path.read_text())
    results = Results(said["about"], failed=said["failed"])
    for row in said["rows"]:
        budget = Budget(**row.pop("budget")) if row["budget"] else row.pop("budget")
        ours, peer = ([Figure(**f) for f in row.pop(side)] for side in ("ours", "peer"))
        results.rows.append(Row(**row, budget=budget, ours=ours, peer=peer))
    for curve in said["curves"]:
        points = [(int(n), float(cost), float(rate)) for n, cost, rate in curve.pop("points")]
        results.curves.append(Curve(**curve, points=points))
    return results
