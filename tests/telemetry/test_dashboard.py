"""The dashboard and the alerts use exported metrics only; the dashboard shows all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric

from runlane_server.core.errors import RunlaneError
from runlane_server.core.model import FinishReason, RunState
from runlane_server.telemetry.metrics import Metrics
from telemetry.metered import STATE

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "runlane.json"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"

LEFT_OUT = {
    "process_virtual_memory_bytes": "unrelated to the memory in use",
    "process_start_time_seconds": "a restart shows in all counters",
    "python_info": "runlane_node_info says which server it is",
    "python_gc_objects_collected": "a run creates no cycles; only useful in the search for a leak",
    "python_gc_objects_uncollectable": "likewise",
    "python_gc_collections": "likewise",
    "runlane_webhook_attempts": "concerns one tenant; `runlane webhooks` shows it to that tenant",
    "runlane_webhook_problems": "an alert says it",
}
"""Metrics that the dashboard does not show, with the reason."""

NOT_OURS = {"up"}
"""Metrics that Prometheus itself adds."""

_WORD = re.compile(r"[a-zA-Z_:][\w:]*")
_FUNCTIONS = {
    *("histogram_quantile", "rate", "increase", "max_over_time"),
    *("sum", "max", "by", "and", "on"),
}


def families() -> list[Metric]:
    """The exported families, each with at least one series."""
    metrics = Metrics(lambda: STATE)
    for metric in vars(metrics).values():
        if names := getattr(metric, "_labelnames", ()):
            metric.labels(*names)
    return list(metrics.registry.collect())


EXPORTED = {family.name: {sample.name for sample in family.samples} for family in families()}
SAMPLES = set().union(*EXPORTED.values())
LABELS = {label for family in families() for sample in family.samples for label in sample.labels}


def metrics_in(expression: str) -> set[str]:
    """The metrics in a PromQL expression."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\b(?:by|on) \([^)]*\)", "", re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare))
    return set(_WORD.findall(bare)) - _FUNCTIONS - NOT_OURS


def panels() -> list[dict[str, Any]]:
    """The panels of the dashboard, without rows."""
    dashboard = json.loads(DASHBOARD.read_text())
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    """All expressions, with the title of the panel or alert."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for rule in alerts():
        yield rule["alert"], rule["expr"]


def alerts() -> list[dict[str, Any]]:
    """The alert rules."""
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def test_metrics_in_finds_the_names_in_an_expression() -> None:
    assert metrics_in(
        'sum by (le, job) (rate(a_b{x="c", y=~"$d"}[5m])) / e > 0.5 and on (g) f == 1'
    ) == {*("a_b", "e", "f")}


@pytest.mark.parametrize(("place", "expression"), list(expressions()))
def test_every_metric_in_an_expression_is_exported(place: str, expression: str) -> None:
    named = metrics_in(expression)
    assert named <= SAMPLES, place
    assert named or place == "RunlaneDown"


def test_the_dashboard_shows_every_metric_except_those_left_out_for_a_reason() -> None:
    shown = set().union(*(metrics_in(e["expr"]) for p in panels() for e in p["targets"]))
    missing = {name for name, samples in EXPORTED.items() if not samples & shown}
    assert missing == set(LEFT_OUT)
    assert all(LEFT_OUT.values())


def test_every_label_in_an_expression_is_exported() -> None:
    for place, expression in expressions():
        listed = ",".join(re.findall(r"\b(?:by|on) \(([^)]*)\)", expression))
        grouped = set(re.findall(r"\w+", listed))
        matched = set(re.findall(r"(\w+)(?:=~?|!=)\"", expression))
        assert grouped | matched <= LABELS | {"job", "instance"}, place


def test_label_values_in_alerts_exist() -> None:
    text = ALERTS.read_text()
    states = {str(state) for state in RunState} | {str(reason) for reason in FinishReason}
    assert set(re.findall(r'state="(\w+)"', text)) <= states
    reasons = {kind.reason for kind in _subclasses(RunlaneError) if "reason" in vars(kind)}
    for found in re.findall(r'reason=~"([\w|]+)"', text):
        assert set(found.split("|")) <= reasons


def _subclasses(kind: type[RunlaneError]) -> Iterator[type[RunlaneError]]:
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)


def test_every_alert_has_a_severity_a_summary_and_a_runbook() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names))
    for rule in alerts():
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["runbook"].endswith(".")
        assert rule["expr"].count("(") == rule["expr"].count(")")


def test_panels_have_unique_ids_and_places_and_variables_are_used() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]]
    assert len(places) == len(set(places))
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", DASHBOARD.read_text()))
    assert used == variables


def test_metric_names_follow_the_conventions_of_prometheus() -> None:
    for name in EXPORTED:
        if name.startswith("runlane_"):
            assert re.fullmatch(r"[a-z][a-z0-9_]*[a-z]", name)
            assert not re.search(r"_(ms|milliseconds|micros|total|tenant|session_id|run_id)$", name)


def test_no_label_names_a_tenant_a_session_or_a_run() -> None:
    assert "finish_reason" in LABELS
    assert not LABELS & {"tenant", "session", "session_id", "run", "run_id"}
