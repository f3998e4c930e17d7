"""Every metric that a server exports, by its name. What is counted where is told in `meter.py`.

There are no labels for tenants, sessions and runs: each of their values would be a time series for
ever, at the server and at whoever scrapes it. What happens to one of them is told by the log and by
ListRuns.

This module needs `prometheus_client`, and is imported only where metrics are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_QUICK = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds, in seconds, of what takes a machine and not an agent its time."""

_LONG = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
"""The same for what takes an agent its time, or a queue."""

_UNITS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class NodeState(NamedTuple):
    """What a node is at the moment of a scrape; ages and leases in seconds.

    `lease` is None where the store is not shared. `beat_age` is infinite for a node that takes
    itself for lost.
    """

    version: str
    store: str
    node_id: str
    runs_active: int
    runs_waiting: int
    slots_in_use: int
    slots_limit: int
    agent_ready: bool
    draining: bool
    subscriptions: Mapping[str, int]
    subscription_behind: int
    log_behind: int
    rpcs_open: Mapping[str, int]
    lease: float | None = None
    beat_age: float = 0.0
    alive: bool = True


class Metrics:
    """All metrics of one server, in a registry of their own.

    `state` is asked at each scrape. What is counted is to be told once it is committed.
    """

    def __init__(self, state: Callable[[], NodeState]) -> None:
        # When a counter was made: twice as many series, and nobody asks.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._make_runs()
        self._make_store()
        self._make_server()
        self.registry.register(_StateCollector(state))
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def _make_runs(self) -> None:
        self.runs_accepted = self._counter("runs_accepted", "Runs accepted, durably.")
        self.runs_started = self._counter(
            "runs_started", "Attempts started on this node: a run that is retried counts again."
        )
        self.runs_ended = self._counter(
            "runs_ended",
            "Runs ended by this node, by their terminal state and finish reason.",
            "state",
            "finish_reason",
        )
        self.queue_wait = self._histogram(
            "run_queue_wait_seconds",
            "From accept to the first start of the agent.",
            _LONG,
        )
        self.first_delta = self._histogram(
            "run_first_delta_seconds",
            "From the start of an attempt to the first piece of its answer.",
            _LONG,
        )
        self.run_duration = self._histogram(
            "run_duration_seconds",
            "From the last start of the agent to the end of the run, for runs that started.",
            _LONG,
            "state",
        )
        self.cancels = self._counter(
            "cancels",
            "Cancels that covered a run, by scope; CancelAll counts in each session where it did.",
            "scope",
        )
        self.cancel_latency = self._histogram(
            "cancel_latency_seconds",
            "From a cancel at this node to the end of a run that it covered, on whichever node.",
            _QUICK,
        )

    def _make_store(self) -> None:
        self.commit_units = self._histogram(
            "commit_units", "How many writes shared one commit.", _UNITS
        )
        self.commit_seconds = self._histogram(
            "commit_seconds", "How long a commit took, synced.", _QUICK
        )
        self.store_unavailable = self._counter(
            "store_unavailable",
            "Writes that failed as the store was away, or did not say what became of them.",
        )
        self.event_lag = self._histogram(
            "event_lag_seconds",
            "From the end of a run until the subscribers of this node are told, per event.",
            _QUICK,
        )

    def _make_server(self) -> None:
        self.rpcs = self._counter(
            "rpcs", "Calls that were answered, by method and status code.", "method", "code"
        )
        self.rpc_seconds = self._histogram(
            "rpc_seconds",
            "How long unary calls took, by method. Streams last as long as somebody listens.",
            _QUICK,
            "method",
        )
        self.rpc_refusals = self._counter(
            "rpc_refusals",
            "Calls that ended with one of the documented reasons, by reason.",
            "reason",
        )
        self.loop_lag = self._histogram(
            "event_loop_lag_seconds",
            "How much later than it was due the event loop came round, four times a second.",
            _QUICK,
        )

    def _counter(self, name: str, help: str, *labels: str) -> Counter:  # noqa: A002 - as there
        return Counter(f"runlane_{name}", help, labels, registry=self.registry)

    def _histogram(
        self,
        name: str,
        help: str,  # noqa: A002 - as there
        buckets: tuple[float, ...],
        *labels: str,
    ) -> Histogram:
        return Histogram(f"runlane_{name}", help, labels, buckets=buckets, registry=self.registry)


class _StateCollector(Collector):
    """What is not counted but looked up, when somebody asks: it costs nothing in between."""

    def __init__(self, state: Callable[[], NodeState]) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        """The gauges of the moment."""
        state = self._state()
        yield _labelled(
            "node_info",
            "What this node is; always 1.",
            {(state.version, state.store, state.node_id): 1},
            "version",
            "store",
            "node_id",
        )
        yield _gauge("runs_active", "Runs whose agent is at work on this node.", state.runs_active)
        yield _gauge(
            "runs_waiting",
            "Runs that wait for their turn; over a shared store those of all nodes, as of the "
            "last beat.",
            state.runs_waiting,
        )
        yield _gauge("slots_in_use", "Sessions with an active run here.", state.slots_in_use)
        yield _gauge("slots_limit", "How many may have one: --max-active-runs.", state.slots_limit)
        yield _gauge("agent_ready", "1 if the agent is ready to run.", state.agent_ready)
        yield _gauge("draining", "1 if the node takes no new runs.", state.draining)
        yield _labelled(
            "subscriptions_open",
            "Open subscriptions, by kind: to ends of runs, or to the events of one run.",
            {(kind,): count for kind, count in state.subscriptions.items()},
            "kind",
        )
        yield _gauge(
            "subscription_behind_events",
            "Events of the log that the slowest subscription has not read.",
            state.subscription_behind,
        )
        yield _gauge(
            "log_behind_events",
            "Events that others have announced and this node has not read; 0 for a node alone.",
            state.log_behind,
        )
        yield _labelled(
            "rpcs_open",
            "Calls under way, streams among them, by method.",
            {(method,): count for method, count in state.rpcs_open.items()},
            "method",
        )
        if state.lease is not None:
            yield from _membership(state, state.lease)


def _membership(state: NodeState, lease: float) -> Iterator[Metric]:
    yield _gauge("node_alive", "1 if this node is sure to be alive for the others.", state.alive)
    yield _gauge(
        "node_beat_age_seconds",
        "Since when the others have not heard of this node; +Inf if it was taken for lost.",
        state.beat_age,
    )
    yield _gauge("node_lease_seconds", "After how long a silence it is lost: --node-lease.", lease)


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(f"runlane_{name}", documentation, value=value)


def _labelled(
    name: str, documentation: str, values: Mapping[tuple[str, ...], float], *labels: str
) -> Metric:
    family = GaugeMetricFamily(f"runlane_{name}", documentation, labels=labels)
    for each, value in values.items():
        family.add_metric(each, value)
    return family
