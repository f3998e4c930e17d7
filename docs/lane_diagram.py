#!/usr/bin/env python3
"""Draws the states of a run from `core.lane.TABLE`, into architecture.md.

python docs/lane_diagram.py            writes the diagram between its markers
python docs/lane_diagram.py --check    exits with 1 if the diagram is out of date
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from generated import between, main

from runlane_server.core.lane import TABLE, Trigger
from runlane_server.core.model import RunState

PAGE = Path(__file__).with_name("architecture.md")


def diagram() -> str:
    """The states and what leads from one to the next, as a Mermaid state diagram."""
    lines = ["```mermaid", "stateDiagram-v2"]
    for (before, trigger), after in TABLE.items():
        lines.append(f"    {before or '[*]'} --> {after}: {trigger}")
    lines += [f"    {state} --> [*]" for state in RunState if state.is_terminal]
    return "\n".join([*lines, "```"])


def explanations() -> str:
    """The comment of each trigger in its class, as a table."""
    comments = dict(
        re.findall(r'^ +\w+ = "(\w+)"  # (.+)$', inspect.getsource(Trigger), re.MULTILINE)
    )
    rows = [f"| {trigger} | {comments[trigger]} |" for trigger in Trigger]
    return "\n".join(["| transition | meaning |", "|---|---|", *rows])


def drawn(page: str) -> str:
    """The page with a fresh diagram. Raises ValueError where it has no place for one."""
    return between(page, "lane-diagram", f"{diagram()}\n\n{explanations()}")


if __name__ == "__main__":
    main(PAGE, drawn, "The state diagram")
