"""Draws results: budgets as bars, costs as curves. Needs the extra `bench`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from bench.result import Curve, Results, Row


def draw(results: Results, path: Path) -> str:
    """Draws the results to a file; returns its path, or the reason why there is none."""
    try:
        # By name, so that linters work without it.
        matplotlib = import_module("matplotlib")
        matplotlib.use("Agg")
        pyplot = import_module("matplotlib.pyplot")
    except ImportError:
        return "no picture: pip install 'runlane[bench]'"
    rows = [row for row in results.rows if row.budget is not None]
    count = len(results.curves) + bool(rows)
    if not count:
        return "nothing to draw"
    figure, found = pyplot.subplots(count, 1, figsize=(9, 4 * count), squeeze=False)
    axes = [row[0] for row in found]
    if rows:
        _bars(axes.pop(0), rows)
    for axis, curve in zip(axes, results.curves, strict=True):
        _curve(axis, curve)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return str(path)


def _bars(axis: Any, rows: list[Row]) -> None:
    """Each result relative to its budget: 1 is the budget, and more is always better."""
    names = [row.name for row in rows]
    values = [_share(row, median(row.judged)) for row in rows]
    colours = ["tab:red" if row.verdict == "SHORT" else "tab:green" for row in rows]
    axis.barh(names, values, color=colours)
    for n, row in enumerate(rows):
        if row.budget and row.budget.stretch:
            axis.plot(_share(row, row.budget.stretch), n, "k|", markersize=16)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_xlim(0, min(max([2.5, *values]), 6))
    axis.invert_yaxis()
    axis.set_xlabel("of the budget; at 1 it is just kept, the mark is the stretch")


def _share(row: Row, value: float) -> float:
    assert row.budget is not None
    if row.budget.at_most:
        return row.budget.limit / max(value, 1e-9)
    return value / row.budget.limit


def _curve(axis: Any, curve: Curve) -> None:
    across = [point[0] for point in curve.points]
    axis.plot(across, [point[1] for point in curve.points], "o-")
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    axis.set_title(curve.title)
    axis.set_xlabel(curve.across)
    axis.set_ylabel(curve.cost)
    axis.grid(alpha=0.3)
