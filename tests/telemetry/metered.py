"""A node without gRPC, with metrics and a clock that a test moves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from runlane_server.agents.scripted.agent import ScriptedAgent
from runlane_server.core.limits import Limits
from runlane_server.core.model import Micros
from runlane_server.engine.coordinator import Coordinator
from runlane_server.feed.feed import Feed
from runlane_server.store.base import Store
from runlane_server.telemetry.meter import Meter
from runlane_server.telemetry.metrics import Metrics, NodeState, StoreState
from support.node import Node
from support.staging import SECONDS

STATE = NodeState(
    version="1.2.3",
    store="sqlite",
    node_id="n",
    runs_active={"default": 1},
    runs_waiting=2,
    slots_in_use=3,
    slots_limit=4,
    agent_ready={"default": True},
    draining=False,
    subscriptions={"run_complete": 5, "run": 6},
    subscription_behind=7,
    log_behind=8,
    rpcs_open={"RunService/SubscribeRun": 9},
    lease=10.0,
    beat_age=2.5,
    alive=True,
    measured=StoreState(
        size=10_000, free=11_000, oldest_waiting_run=12.0, oldest_input_request=13.0
    ),
    webhooks={"arrived": 0},
    webhook_problems={"disabled": 0},
    workers_quarantined=0,
)
"""A state of a node with a shared store, in which every metric has a value."""


@dataclass
class Clock:
    """A clock that stands still until it is moved."""

    micros: Micros = 1_000_000_000_000

    def __call__(self) -> Micros:
        return self.micros

    def move(self, seconds: float) -> None:
        """Moves the clock forward."""
        self.micros += round(seconds * 1e6)


@dataclass
class Metered:
    """A node, its metrics, and its clock."""

    node: Node
    metrics: Metrics
    clock: Clock

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels, of which there may be more; 0 if there is
        none."""
        return sum(
            sample.value
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if sample.name == f"runlane_{name}" and labels.items() <= sample.labels.items()
        )

    def observed(self, name: str, **labels: str) -> tuple[float, float]:
        """The number of values in a histogram, and their sum."""
        return self.value(f"{name}_count", **labels), self.value(f"{name}_sum", **labels)


@asynccontextmanager
async def metered(store: Store, limits: Limits | None = None) -> AsyncIterator[Metered]:
    """A node on an open store."""
    clock, feed, agent = Clock(), Feed(store), ScriptedAgent()
    metrics = Metrics(lambda: STATE)
    meter = Meter(metrics, feed, clock)
    store.listener = store.write_observer = meter
    coordinator = Coordinator(
        store,
        agent,
        feed,
        limits or Limits(cancel_grace=SECONDS),
        now=clock,
        observer=meter,
    )
    await coordinator.start()
    try:
        yield Metered(Node(store, feed, coordinator, agent.latches), metrics, clock)
    finally:
        feed.close()
        await coordinator.stop()
