#!/usr/bin/env python3
"""Writes the table of metrics into operations.md, from the registry of a server.

python docs/metrics_table.py            writes the table between its markers
python docs/metrics_table.py --check    only tells whether it is fresh: exit code 1 if not
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from runlane_server.metrics import Metrics, NodeState

PAGE = Path(__file__).with_name("operations.md")
BEGIN, END = "<!-- metrics:begin -->", "<!-- metrics:end -->"

_STATE = NodeState(
    version="",
    store="",
    node_id="",
    runs_active=0,
    runs_waiting=0,
    slots_in_use=0,
    slots_limit=0,
    agent_ready=True,
    draining=False,
    subscriptions={"run": 0},
    subscription_behind=0,
    log_behind=0,
    rpcs_open={"": 0},
    lease=0.0,
)
"""A node of a shared store, which has all metrics."""


def table() -> str:
    """Our metrics, as they are named in a query, with their labels."""
    metrics = Metrics(lambda: _STATE)
    labels = {
        getattr(metric, "_name", ""): getattr(metric, "_labelnames", ())
        for metric in vars(metrics).values()
    }
    rows = []
    for family in metrics.registry.collect():
        if not family.name.startswith("runlane_"):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        of_gauge = family.samples[0].labels if family.type == "gauge" else ()
        shown = ", ".join(f"`{label}`" for label in labels.get(family.name, of_gauge))
        rows.append(f"| `{name}` | {family.type} | {shown} | {family.documentation} |")
    return "\n".join(["| name | type | labels | what it is |", "|---|---|---|---|", *rows])


def written(page: str) -> str:
    """The page with a fresh table. Raises ValueError where it has no place for one."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE.name} has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    """Writes the table, or checks it."""
    parser = argparse.ArgumentParser(description="The table of metrics.")
    parser.add_argument("--check", action="store_true", help="only tell whether it is fresh")
    told = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    fresh = written(page)
    if not told.check:
        PAGE.write_text(fresh, encoding="utf-8")
    elif page != fresh:
        sys.exit("The table in docs/operations.md is stale: run docs/metrics_table.py")


if __name__ == "__main__":
    main()
