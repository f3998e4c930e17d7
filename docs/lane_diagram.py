#!/usr/bin/env python3
"""Draws the states of a run from `core.lane.TABLE`, into architecture.md.

python docs/lane_diagram.py            writes the diagram between its markers
python docs/lane_diagram.py --check    only tells whether it is fresh: exit code 1 if not
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path

from runlane_server.core.lane import TABLE, Happening
from runlane_server.core.model import RunState

PAGE = Path(__file__).with_name("architecture.md")
BEGIN, END = "<!-- lane-diagram:begin -->", "<!-- lane-diagram:end -->"


def diagram() -> str:
    """The states and what leads from one to the next, as a Mermaid state diagram."""
    lines = ["```mermaid", "stateDiagram-v2"]
    for (before, happening), after in TABLE.items():
        lines.append(f"    {before or '[*]'} --> {after}: {happening}")
    lines += [f"    {state} --> [*]" for state in RunState if state.terminal]
    return "\n".join([*lines, "```"])


def explanations() -> str:
    """What each happening is: the comments in its class, as a table."""
    told = dict(
        re.findall(r'^ +\w+ = "(\w+)"  # (.+)$', inspect.getsource(Happening), re.MULTILINE)
    )
    rows = [f"| {happening} | {told[happening]} |" for happening in Happening]
    return "\n".join(["| what happens | to the run |", "|---|---|", *rows])


def drawn(page: str) -> str:
    """The page with a fresh diagram. Raises ValueError where it has no place for one."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE.name} has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{diagram()}\n\n{explanations()}\n{END}{after}"


def main() -> None:
    """Writes the diagram, or checks it."""
    parser = argparse.ArgumentParser(description="The state diagram of a run.")
    parser.add_argument("--check", action="store_true", help="only tell whether it is fresh")
    told = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    fresh = drawn(page)
    if not told.check:
        PAGE.write_text(fresh, encoding="utf-8")
    elif page != fresh:
        sys.exit("The state diagram in docs/architecture.md is stale: run docs/lane_diagram.py")


if __name__ == "__main__":
    main()
