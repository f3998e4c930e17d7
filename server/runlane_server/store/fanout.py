"""How a store passes commits to its listener and to its write observer.

Neither can fail a write: their errors are logged.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import structlog

from runlane_server.core.model import RunEvent, RunKey
from runlane_server.store.base import Listener, LoggedComplete, WriteObserver
from runlane_server.store.lane_log import LaneChange

log = structlog.get_logger()


def publish_completes(listener: Listener | None, events: Sequence[LoggedComplete]) -> None:
    """Passes terminal events on. An error of the listener is logged: the events are committed."""
    if listener is None:
        return
    try:
        listener.on_completes(events)
    except Exception:
        log.exception("the store's listener failed")


def publish_run_events(listener: Listener | None, tenant: str, events: Sequence[RunEvent]) -> None:
    """Passes events of runs on, run by run. An error of the listener is logged."""
    if listener is None:
        return
    try:
        for run_id, own in _by_run(events):
            listener.on_run_events(RunKey(tenant, run_id), own)
    except Exception:
        log.exception("the store's listener failed")


def publish_lane(listener: Listener | None, change: LaneChange | None) -> None:
    """Passes the commit of a lane on, after its events. An error of the listener is logged."""
    if listener is None or change is None:
        return
    try:
        listener.on_lane(change)
    except Exception:
        log.exception("the store's listener failed")


def observe_commit(observer: WriteObserver | None, units: int, seconds: float) -> None:
    """Reports a commit. An error of the observer is logged."""
    if observer is None:
        return
    try:
        observer.on_committed(units, seconds)
    except Exception:
        log.exception("the store's write observer failed")


def observe_unconfirmed(observer: WriteObserver | None, units: int) -> None:
    """Reports writes that were not confirmed. An error of the observer is logged."""
    if observer is None:
        return
    try:
        observer.on_unconfirmed(units)
    except Exception:
        log.exception("the store's write observer failed")


def _by_run(events: Sequence[RunEvent]) -> list[tuple[str, list[RunEvent]]]:
    """The events of each run, in order."""
    if not events:
        return []
    first = events[0].run_id
    if len(events) == 1 or all(event.run_id == first for event in events):
        return [(first, list(events))]
    ordered = sorted(events, key=lambda event: event.run_id)  # stable: keeps the order in a run
    return [(run_id, list(own)) for run_id, own in groupby(ordered, key=lambda it: it.run_id)]
