"""Counts what happens. It stands where commits are told, so nothing is counted that is not one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from runlane_server.core.model import (
    Accepted,
    Micros,
    RunComplete,
    RunEvent,
    RunKey,
    RunState,
    TextDelta,
)
from runlane_server.core.observer import CancelRequest, Observer
from runlane_server.core.recent import RecentItems
from runlane_server.core.transition import LaneRun, Receipt, Transition
from runlane_server.store.base import Listener, LoggedComplete
from runlane_server.telemetry.metrics import Metrics

Family = TypeVar("Family", bound=Any)

OPEN_CANCELS = 10_000
"""How many covered runs are remembered until they end. What is given up before it becomes a run
never does."""


class Meter(Observer):
    """Puts into metrics what a node does.

    It is the listener of the store in front of another one, which is told first; the write observer
    of its commits; and the observer of everything else.
    """

    __slots__ = ("_cancels", "_listener", "_metrics", "_now", "_series", "_silent")

    def __init__(self, metrics: Metrics, listener: Listener, now: Callable[[], Micros]) -> None:
        self._metrics = metrics
        self._listener = listener
        self._now = now
        # When the attempts started that have said nothing yet.
        self._silent: dict[RunKey, Micros] = {}
        # When the cancels were asked for whose runs have not ended yet.
        self._cancels: RecentItems[RunKey, Micros] = RecentItems(OPEN_CANCELS)
        self._series: dict[tuple[object, tuple[str, ...]], Any] = {}

    # The store's listener

    def on_completes(self, events: Sequence[LoggedComplete]) -> None:
        """Runs ended, on whichever node: how late is that told, and how long did cancels take."""
        self._listener.on_completes(events)
        now = self._now()
        for event in events:
            complete = event.complete
            self._metrics.event_lag.observe(_seconds(complete.ended_at, now))
            if complete.state is RunState.CANCELLED:
                asked_at = self._cancels.take(RunKey(event.tenant, complete.run_id))
                if asked_at is not None:
                    self._metrics.cancel_latency.observe(_seconds(asked_at, now))

    def on_run_events(self, key: RunKey, events: Sequence[RunEvent]) -> None:
        """Events of a run were committed by this node, and by no other one."""
        self._listener.on_run_events(key, events)
        for event in events:
            body = event.body
            if isinstance(body, TextDelta):
                started_at = self._silent.pop(key, None)
                if started_at is not None:
                    self._metrics.first_delta.observe(_seconds(started_at, event.at))
            elif isinstance(body, Accepted):
                self._metrics.runs_accepted.inc()
            elif isinstance(body, RunComplete):
                self._ended(body)

    def _ended(self, complete: RunComplete) -> None:
        metrics = self._metrics
        self._of(metrics.runs_ended, complete.state, complete.finish_reason).inc()
        if complete.started_at is not None:
            seconds = _seconds(complete.started_at, complete.ended_at)
            self._of(metrics.run_duration, complete.state).observe(seconds)

    # The store's write observer

    def on_committed(self, units: int, seconds: float) -> None:
        """So many units were committed together, and it took so long."""
        self._metrics.commit_units.observe(units)
        self._metrics.commit_seconds.observe(seconds)

    def on_unconfirmed(self, units: int) -> None:
        """So many units were given to the store, and it did not say what became of them."""
        self._metrics.store_unavailable.inc(units)

    # The observer

    def on_attempt_started(self, key: RunKey, run: LaneRun) -> None:
        """An attempt of a run became active here."""
        self._metrics.runs_started.inc()
        if run.started_at is None:
            return
        self._silent[key] = run.started_at
        if run.attempt == 1:
            self._metrics.queue_wait.observe(_seconds(run.accepted_at, run.started_at))

    def on_attempt_ended(self, key: RunKey) -> None:
        """The attempt that was active here is not any more."""
        self._silent.pop(key, None)

    def on_cancelled(self, asked: CancelRequest, made: Transition, receipt: Receipt) -> None:
        """What waited has ended with the cancel; what was active does so by and by."""
        if not receipt.cancelled:
            return
        self._of(self._metrics.cancels, asked.scope).inc()
        ended = {complete.run_id for complete in made.completes}
        now = self._now()
        for run in receipt.cancelled:
            if run.run_id in ended:
                self._metrics.cancel_latency.observe(_seconds(asked.at, now))
            else:
                self._cancels.put(RunKey(asked.key.tenant, run.run_id), asked.at)

    def on_call_ended(self, method: str, code: str, reason: str, seconds: float | None) -> None:
        """A call ended."""
        self._of(self._metrics.rpcs, method, code).inc()
        if seconds is not None:
            self._of(self._metrics.rpc_seconds, method).observe(seconds)
        if reason:
            self._of(self._metrics.rpc_refusals, reason).inc()

    def _of(self, family: Family, *labels: str) -> Family:
        """The series with those labels. The library's own way to it costs more than counting."""
        key = (family, labels)
        found: Family | None = self._series.get(key)
        if found is not None:
            return found
        made: Family = family.labels(*labels)
        self._series[key] = made
        return made


def _seconds(begin: Micros, end: Micros) -> float:
    """How long it took; the clocks of two nodes may differ, and nothing takes less than no time."""
    return max(0, end - begin) / 1e6
