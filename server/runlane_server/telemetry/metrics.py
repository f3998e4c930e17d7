"""Every metric that a server exports. `meter.py` updates the counters and histograms.

No metric has a label for tenants, sessions or runs: each value would be a time series for ever, in
the server and in Prometheus. For single sessions and runs use the log and ListRuns.

This module needs `prometheus_client`, and is imported only if metrics are enabled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
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
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_QUICK = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Bucket bounds in seconds for durations that depend on the server."""

_LONG = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
"""Bucket bounds in seconds for durations that depend on an agent or a queue."""

_UNITS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class StoreState(NamedTuple):
    """Sizes in bytes and ages in seconds, as the store measured them; None for what it could not
    measure."""

    size: int | None = None
    free: int | None = None
    oldest_waiting_run: float | None = None
    oldest_input_request: float | None = None


class NodeState(NamedTuple):
    """The state of a node at the moment of a scrape; ages and leases in seconds.

    `runs_active` and `agent_ready` are by agent. `workers_quarantined` is None without an agent
    that workers execute. `lease` is None if the store is not shared.
    `webhooks` counts attempts by outcome, `webhook_problems` what callers should know by kind.
    `beat_age` is infinite for a node that considers itself lost.
    """

    version: str
    store: str
    node_id: str
    runs_active: Mapping[str, int]
    runs_waiting: int
    slots_in_use: int
    slots_limit: int
    agent_ready: Mapping[str, bool]
    draining: bool
    subscriptions: Mapping[str, int]
    subscription_behind: int
    log_behind: int
    rpcs_open: Mapping[str, int]
    workers_quarantined: int | None = None
    worker_quarantines: int = 0
    lease: float | None = None
    beat_age: float = 0.0
    alive: bool = True
    measured: StoreState = StoreState()
    webhooks: Mapping[str, int] = MappingProxyType({})
    webhook_problems: Mapping[str, int] = MappingProxyType({})


class Metrics:
    """All metrics of one server, in their own registry.

    `state` is called at each scrape. Update counters only after the commit.
    """

    def __init__(self, state: Callable[[], NodeState]) -> None:
        # The creation times of counters would double the number of series, for no use.
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
        self.runs_accepted = self._counter("runs_accepted", "Runs accepted (durable).")
        self.runs_started = self._counter(
            "runs_started",
            "Attempts started on this node, by agent; a retried run counts again.",
            "agent",
        )
        self.runs_ended = self._counter(
            "runs_ended",
            "Runs ended by this node, by terminal state, finish reason and agent.",
            "state",
            "finish_reason",
            "agent",
        )
        self.runs_fenced_off = self._counter(
            "runs_fenced_off",
            "Stopped attempts whose agent, or a task it started, outlived the grace period.",
        )
        self.queue_wait = self._histogram(
            "run_queue_wait_seconds",
            "Time from accept to the first start of the agent.",
            _LONG,
        )
        self.first_delta = self._histogram(
            "run_first_delta_seconds",
            "Time from the start of an attempt to its first text delta.",
            _LONG,
        )
        self.run_duration = self._histogram(
            "run_duration_seconds",
            "Time from the last start of the agent to the end of the run, for runs that started.",
            _LONG,
            "state",
        )
        self.cancels = self._counter(
            "cancels",
            "Cancels that covered a run, by scope; CancelAll counts once per session covered.",
            "scope",
        )
        self.cancel_latency = self._histogram(
            "cancel_latency_seconds",
            "Time from a cancel on this node to the end of a run that it covered, on any node.",
            _QUICK,
        )

    def _make_store(self) -> None:
        self.commit_units = self._histogram("commit_units", "Writes per commit.", _UNITS)
        self.commit_seconds = self._histogram(
            "commit_seconds", "Duration of a commit, sync included.", _QUICK
        )
        self.store_unavailable = self._counter(
            "store_unavailable",
            "Writes that failed or have an unknown outcome because the store was unavailable.",
        )
        self.event_lag = self._histogram(
            "event_lag_seconds",
            "Time from the end of a run to its delivery to subscribers of this node, per event.",
            _QUICK,
        )

    def _make_server(self) -> None:
        self.rpcs = self._counter(
            "rpcs", "Calls that were answered, by method and status code.", "method", "code"
        )
        self.rpc_seconds = self._histogram(
            "rpc_seconds",
            "Duration of unary calls, by method; streams are left out.",
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
            "Delay of the event loop, sampled four times per second.",
            _QUICK,
        )

        self.loop_blocked = self._counter(
            "event_loop_blocked",
            "Times that code held the event loop for more than 200 ms; the log says which.",
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
    """Gauges that are computed at a scrape and cost nothing in between."""

    def __init__(self, state: Callable[[], NodeState]) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        """Yields the gauges of the current state."""
        state = self._state()
        yield _labelled(
            "node_info",
            "Version, store and id of this node as labels; always 1.",
            {(state.version, state.store, state.node_id): 1},
            "version",
            "store",
            "node_id",
        )
        yield _labelled(
            "runs_active",
            "Runs whose agent is running on this node, by agent.",
            {(agent,): runs for agent, runs in state.runs_active.items()},
            "agent",
        )
        yield _gauge(
            "runs_waiting",
            "Waiting runs; with a shared store those of all nodes, as of the last heartbeat.",
            state.runs_waiting,
        )
        yield _gauge(
            "slots_in_use", "Sessions with an active run on this node.", state.slots_in_use
        )
        yield _gauge(
            "slots_limit",
            "Maximum number of active runs on this node (--max-active-runs).",
            state.slots_limit,
        )
        yield _labelled(
            "agent_ready",
            "1 if the agent is ready; without agents that execute nothing on this node.",
            {(agent,): ready for agent, ready in state.agent_ready.items()},
            "agent",
        )
        yield _gauge("draining", "1 if the node accepts no new runs.", state.draining)
        yield _labelled(
            "subscriptions_open",
            "Open subscriptions by kind: run_complete for ends of runs, run for one run's events.",
            {(kind,): count for kind, count in state.subscriptions.items()},
            "kind",
        )
        yield _gauge(
            "subscription_behind_events",
            "Events of the log that the slowest subscription has not read yet.",
            state.subscription_behind,
        )
        yield _gauge(
            "log_behind_events",
            "Events announced by other nodes that this node has not read yet; 0 for a single node.",
            state.log_behind,
        )
        yield _labelled(
            "rpcs_open",
            "Open calls, streams included, by method.",
            {(method,): count for method, count in state.rpcs_open.items()},
            "method",
        )
        yield _counted(
            "webhook_attempts",
            "Attempts to deliver to webhooks, by outcome.",
            state.webhooks,
            "outcome",
        )
        yield _counted(
            "webhook_problems",
            "Webhooks that were disabled, events given up, times that events were lost because the "
            "event log was compacted, and secrets that cannot be decrypted, by kind.",
            state.webhook_problems,
            "kind",
        )
        if state.workers_quarantined is not None:
            yield from _quarantines(state.workers_quarantined, state.worker_quarantines)
        yield from _measured(state.measured)
        if state.lease is not None:
            yield from _membership(state, state.lease)


def _measured(state: StoreState) -> Iterator[Metric]:
    for name, documentation, value in (
        ("store_size_bytes", "Size of the store; all of its tables, if it is shared.", state.size),
        (
            "store_free_bytes",
            "Free space on the disk of the store; only for a SQLite file.",
            state.free,
        ),
        (
            "oldest_waiting_run_seconds",
            "Age of the run that has waited longest; 0 without any.",
            state.oldest_waiting_run,
        ),
        (
            "oldest_input_request_seconds",
            "Age of the oldest open input request; 0 without any.",
            state.oldest_input_request,
        ),
    ):
        if value is not None:
            yield _gauge(name, documentation, value)


def _quarantines(now: int, started: int) -> Iterator[Metric]:
    yield _gauge(
        "workers_quarantined",
        "Workers, and callers with all their workers, that get no turns now after repeated faults.",
        now,
    )
    yield CounterMetricFamily(
        "runlane_worker_quarantines",
        "Times that a worker, or a caller with all its workers, got no turns for a while.",
        value=started,
    )


def _membership(state: NodeState, lease: float) -> Iterator[Metric]:
    yield _gauge("node_alive", "1 if this node is certain that its lease is valid.", state.alive)
    yield _gauge(
        "node_beat_age_seconds",
        "Age of this node's last heartbeat; +Inf if the node was declared lost.",
        state.beat_age,
    )
    yield _gauge("node_lease_seconds", "Heartbeat timeout of a node (--node-lease).", lease)


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(f"runlane_{name}", documentation, value=value)


def _counted(name: str, documentation: str, values: Mapping[str, int], label: str) -> Metric:
    family = CounterMetricFamily(f"runlane_{name}", documentation, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family


def _labelled(
    name: str, documentation: str, values: Mapping[tuple[str, ...], float], *labels: str
) -> Metric:
    family = GaugeMetricFamily(f"runlane_{name}", documentation, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family
