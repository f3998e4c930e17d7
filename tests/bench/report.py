"""Formats results: `python -m bench.report FILE` prints the table for the docs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bench.result import Curve, Figure, Results, Row, read

_HEAD = "| what | measured | spread | budget | | ours | peer | CPU of server, load |"
_RULE = "|---|---|---|---|---|---|---|---|"


def heading(results: Results) -> str:
    """One line about the machine and the settings."""
    return ", ".join(f"{name}: {value}" for name, value in results.about.items())


def table(results: Results) -> str:
    """All results as a Markdown table."""
    parts = ["\n".join([_HEAD, _RULE, *(_row(row) for row in results.rows)])]
    parts += [_curve(curve) for curve in results.curves]
    return "\n\n".join(parts)


def line(found: Row | Curve) -> str:
    """One result as a line of progress."""
    if isinstance(found, Curve):
        points = ", ".join(f"{n:,}: {cost:.0f}" for n, cost, _ in found.points)
        return f"{found.name:16} {found.cost}: {points}"
    ours = f"{_number(_median(found.ours))} {found.unit}"
    peer = f", peer {_number(_median(found.peer))}" if found.peer else ""
    judged = f"{_number(median(found.judged))} {found.verdict}  " if found.judged else ""
    return f"{found.name:16} {judged}({ours}{peer}; CPU {_cpu(found)}){_notes(found)}"


def _row(row: Row) -> str:
    cells = [
        row.title + _notes(row),
        f"{_number(median(row.judged))} {row.judged_unit}".strip() if row.judged else "",
        f"{_number(min(row.judged))} to {_number(max(row.judged))}" if row.judged else "",
        _budget(row),
        row.verdict,
        f"{_number(_median(row.ours))} {row.unit}",
        f"{_number(_median(row.peer))} {row.unit}" if row.peer else "",
        _cpu(row),
    ]
    return "| " + " | ".join(cells) + " |"


def _budget(row: Row) -> str:
    if row.budget is None:
        return ""
    limit = f"{'≤' if row.budget.at_most else '≥'} {_number(row.budget.limit)}"
    stretch = row.budget.stretch
    return limit if stretch is None else f"{limit} ({_number(stretch)})"


def _cpu(row: Row) -> str:
    def shares(figures: Sequence[Figure]) -> str:
        server = median(figure.server_cpu for figure in figures)
        return f"{server:.0%}, {median(figure.load_cpu for figure in figures):.0%}"

    measured = [figures for figures in (row.ours, row.peer) if figures and figures[0].server_cpu]
    bound = " (the load was the limit)" if row.load_bound else ""
    return "; ".join(shares(figures) for figures in measured) + bound


def _notes(row: Row) -> str:
    return "".join(f"; {name}: {_number(value)}" for name, value in row.notes.items())


def _curve(curve: Curve) -> str:
    head = f"| {curve.across} | {curve.cost} | a second |\n|---|---|---|"
    points = [f"| {n:,} | {cost:,.1f} | {rate:,.0f} |" for n, cost, rate in curve.points]
    return "\n".join([f"{curve.title[0].upper()}{curve.title[1:]}:", "", head, *points])


def _median(figures: Sequence[Figure]) -> float:
    return median(figure.value for figure in figures)


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


if __name__ == "__main__":
    found = read(Path(sys.argv[1]))
    sys.stdout.write(f"{heading(found)}\n\n{table(found)}\n")
