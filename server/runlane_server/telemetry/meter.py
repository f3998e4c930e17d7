"""Updates the metrics of a node from its commits, so nothing counts before it is durable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from runlane_server.core.agents import DEFAULT_AGENT
from runlane_server.core.model import (
    Accepted,
    Micros,
    RunComplete,
    RunEvent,
    RunKey,
    RunState,
    SessionKey,
    TextDelta,
)
from runlane_server.core.observer import CancelRequest, Observer
from runlane_server.core.recent import RecentItems
from runlane_server.core.transition import LaneRun, Receipt, Transition
from runlane_server.store.base import Listener, LoggedComplete
from runlane_server.store.lane_log import LaneChange
from runlane_server.telemetry.metrics import Metrics

Family = TypeVar("Family", bound=Any)

OPEN_CANCELS = 10_000
"""Number of cancelled runs remembered until they end. The bound is needed: a reservation that is
closed before it becomes a run never ends."""


class Meter(Observer):
    """Updates metrics from the events of a node.

    It is the store's listener (and forwards each event to `listener` first), the write observer of
    its commits, and the observer of everything else.
    """

    __slots__ = ("_cancels", "_listener", "_metrics", "_now", "_series", "_silent_since")

    def __init__(self, metrics: Metrics, listener: Listener, now: Callable[[], Micros]) -> None:
        self._metrics = metrics
        self._listener = listener
        self._now = now
        # The start of each attempt that has yielded no text yet.
        self._silent_since: dict[RunKey, Micros] = {}
        # The time of the cancel of each run that has not ended yet.
        self._cancels: RecentItems[RunKey, Micros] = RecentItems(OPEN_CANCELS)
        self._series: dict[tuple[object, tuple[str, ...]], Any] = {}

    # The store's listener

    def on_completes(self, events: Sequence[LoggedComplete]) -> None:
        """Runs ended on any node: observes the delivery lag and the duration of cancels."""
        self._listener.on_completes(events)
        now = self._now()
        for event in events:
            complete = event.complete
            self._metrics.event_lag.observe(_seconds(complete.ended_at, now))
            if complete.state is RunState.CANCELLED:
                requested_at = self._cancels.take(RunKey(event.tenant, complete.run_id))
                if requested_at is not None:
                    self._metrics.cancel_latency.observe(_seconds(requested_at, now))

    def on_run_events(self, key: RunKey, events: Sequence[RunEvent]) -> None:
        """This node committed events of a run."""
        self._listener.on_run_events(key, events)
        for event in events:
            body = event.body
            if isinstance(body, TextDelta):
                started_at = self._silent_since.pop(key, None)
                if started_at is not None:
                    self._metrics.first_delta.observe(_seconds(started_at, event.at))
            elif isinstance(body, Accepted):
                self._metrics.runs_accepted.inc()

    def on_lane(self, change: LaneChange) -> None:
        """This node committed a change of a lane."""
        self._listener.on_lane(change)

    def _ended(self, complete: RunComplete, agent: str) -> None:
        metrics = self._metrics
        reason = complete.finish_reason
        self._labelled(metrics.runs_ended, complete.state, reason, agent or DEFAULT_AGENT).inc()
        if complete.started_at is not None:
            seconds = _seconds(complete.started_at, complete.ended_at)
            self._labelled(metrics.run_duration, complete.state).observe(seconds)

    # The store's write observer

    def on_committed(self, units: int, seconds: float) -> None:
        """One commit of this many writes took this many seconds."""
        self._metrics.commit_units.observe(units)
        self._metrics.commit_seconds.observe(seconds)

    def on_unconfirmed(self, units: int) -> None:
        """The store did not confirm this many writes."""
        self._metrics.store_unavailable.inc(units)

    # The observer

    def on_lane_changed(self, key: SessionKey, transition: Transition) -> None:
        """This node committed the ends of runs."""
        for change in transition.runs:
            if change.complete is not None:
                self._ended(change.complete, change.run.agent)

    def on_attempt_started(self, key: RunKey, run: LaneRun) -> None:
        """An attempt of a run became active here."""
        self._labelled(self._metrics.runs_started, run.agent or DEFAULT_AGENT).inc()
        if run.started_at is None:
            return
        self._silent_since[key] = run.started_at
        if run.attempt == 1:
            self._metrics.queue_wait.observe(_seconds(run.accepted_at, run.started_at))

    def on_attempt_ended(self, key: RunKey) -> None:
        """The attempt is no longer active on this node."""
        self._silent_since.pop(key, None)

    def on_fenced_off(self, key: RunKey) -> None:
        """Code of a stopped attempt did not return in time."""
        self._metrics.runs_fenced_off.inc()

    def on_loop_blocked(self) -> None:
        """Code held the event loop."""
        self._metrics.loop_blocked.inc()

    def on_cancelled(self, asked: CancelRequest, made: Transition, receipt: Receipt) -> None:
        """A cancel took effect: waiting runs have ended with it, active ones end later."""
        if not receipt.cancelled:
            return
        self._labelled(self._metrics.cancels, asked.scope).inc()
        ended = {complete.run_id for complete in made.completes}
        now = self._now()
        for run in receipt.cancelled:
            if run.run_id in ended:
                self._metrics.cancel_latency.observe(_seconds(asked.at, now))
            else:
                self._cancels.put(RunKey(asked.key.tenant, run.run_id), asked.at)

    def on_call_ended(self, method: str, code: str, reason: str, seconds: float | None) -> None:
        """A call ended."""
        self._labelled(self._metrics.rpcs, method, code).inc()
        if seconds is not None:
            self._labelled(self._metrics.rpc_seconds, method).observe(seconds)
        if reason:
            self._labelled(self._metrics.rpc_refusals, reason).inc()

    def _labelled(self, family: Family, *labels: str) -> Family:
        """The series with these labels, cached: looking it up in the library costs more than
        counting."""
        key = (family, labels)
        found: Family | None = self._series.get(key)
        if found is not None:
            return found
        series: Family = family.labels(*labels)
        self._series[key] = series
        return series


def _seconds(begin: Micros, end: Micros) -> float:
    """The duration in seconds, never negative: the clocks of two nodes may differ."""
    return max(0, end - begin) / 1e6
