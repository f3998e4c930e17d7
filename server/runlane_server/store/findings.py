"""The outcome of a check of a database."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

MAX_LINES = 20
"""The most lines that one check prints, as one cause may affect a million rows."""


@dataclass(frozen=True, slots=True)
class Counts:
    """The number of rows in a database, by kind."""

    sessions: int
    runs: int
    events: int


@dataclass(frozen=True, slots=True)
class Findings:
    """The outcome of a check: one line for each problem, which begins with the name of the check;
    `counts` only if there are none."""

    problems: tuple[str, ...]
    counts: Counts | None


def first_lines(name: str, lines: Iterable[str]) -> Iterator[str]:
    """The first problems that a check found, and the number of the others."""
    rest = iter(lines)
    for line in islice(rest, MAX_LINES):
        yield f"{name}: {line}"
    if more := sum(1 for _ in rest):
        yield f"{name}: and {more} more"
