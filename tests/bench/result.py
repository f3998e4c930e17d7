"""The results of a benchmark: rows, and the points of curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value, and the CPU shares of the server and the load."""

    value: float
    server_cpu: float = 0.0
    load_cpu: float = 0.0


@dataclass(frozen=True, slots=True)
class Budget:
    """A budget. With `at_most` it is an upper bound; otherwise a lower one."""

    limit: float
    stretch: float | None = None
    at_most: bool = False

    def met(self, value: float) -> bool:
        """Whether a value is within the budget."""
        return value <= self.limit if self.at_most else value >= self.limit

    def stretched(self, value: float) -> bool:
        """Whether a value reaches the stretch goal."""
        if self.stretch is None:
            return False
        return value <= self.stretch if self.at_most else value >= self.stretch


@dataclass(slots=True)
class Row:
    """A row of the table. The budget applies to `judged`, one value per round.

    `ours` and `peer` are absolute values in `unit`; `peer` is the reference for `ours`.
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
        """Whether the row is within its budget."""
        if self.budget is None:
            return ""
        value = median(self.judged)
        if self.budget.stretched(value):
            return "stretch"
        return "pass" if self.budget.met(value) else "SHORT"

    @property
    def load_bound(self) -> bool:
        """Whether the load generator was the bottleneck: the value is then a lower bound."""
        return any(f.load_cpu > 0.95 and f.server_cpu < 0.9 for f in (*self.ours, *self.peer))


@dataclass(slots=True)
class Curve:
    """A cost by size: `points` are (size, CPU microseconds of the server, rate per second)."""

    name: str
    title: str
    across: str
    cost: str
    points: list[tuple[int, float, float]]


@dataclass(slots=True)
class Results:
    """All results of one benchmark."""

    about: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, found: Sequence[Row | Curve]) -> None:
        """Adds the results of one measurement."""
        for one in found:
            if isinstance(one, Row):
                self.rows.append(one)
            else:
                self.curves.append(one)

    def write(self, path: Path) -> None:
        """Writes the results as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1))


def read(path: Path) -> Results:
    """Reads written results."""
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
