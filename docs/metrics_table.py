#!/usr/bin/env python3
"""Writes the table of metrics into monitoring.md, from the registry of a server.

python docs/metrics_table.py            writes the table between its markers
python docs/metrics_table.py --check    exits with 1 if the table is out of date
"""

from __future__ import annotations

from pathlib import Path

from generated import between, main

from runlane_server.telemetry.metrics import Metrics, NodeState, StoreState

PAGE = Path(__file__).with_name("monitoring.md")

_STATE = NodeState(
    version="",
    store="",
    node_id="",
    runs_active={"default": 0},
    runs_waiting=0,
    slots_in_use=0,
    slots_limit=0,
    agent_ready={"default": True},
    draining=False,
    subscriptions={"run": 0},
    subscription_behind=0,
    log_behind=0,
    rpcs_open={"": 0},
    workers_quarantined=0,
    lease=0.0,
    measured=StoreState(0, 0, 0.0, 0.0),
    webhooks={"arrived": 0},
    webhook_problems={"disabled": 0},
)
"""A state that has all metrics, though no store has all of them."""


def table() -> str:
    """Runlane's metrics as a Markdown table, named as in a query."""
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
        of_sample = family.samples[0].labels if family.samples else ()
        shown = ", ".join(f"`{label}`" for label in labels.get(family.name, of_sample))
        rows.append(f"| `{name}` | {family.type} | {shown} | {family.documentation} |")
    return "\n".join(["| name | type | labels | meaning |", "|---|---|---|---|", *rows])


def written(page: str) -> str:
    """The page with a new table. Raises ValueError if the page lacks the markers."""
    return between(page, "metrics", table())


if __name__ == "__main__":
    main(PAGE, written, "The table of metrics")
