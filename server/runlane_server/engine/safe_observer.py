"""An observer that cannot harm a run: what it raises is logged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog

from runlane_server.core.model import RunKey, SessionKey
from runlane_server.core.observer import CancelRequest, Observer
from runlane_server.core.transition import LaneRun, Receipt, Transition

log = structlog.get_logger()


class SafeObserver(Observer):
    """Forwards the callbacks of the engine to an observer.

    They come between a commit and the actions that must follow it, such as the start of an agent.
    """

    __slots__ = ("_observer",)

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def on_accepted(self, key: RunKey, run: LaneRun, called_at: int) -> None:
        """Forwards the callback."""
        _forward(self._observer.on_accepted, key, run, called_at)

    def on_lane_changed(self, key: SessionKey, transition: Transition) -> None:
        """Forwards the callback."""
        _forward(self._observer.on_lane_changed, key, transition)

    def on_attempt_started(self, key: RunKey, run: LaneRun) -> None:
        """Forwards the callback."""
        _forward(self._observer.on_attempt_started, key, run)

    def on_agent_returned(self, key: RunKey) -> None:
        """Forwards the callback."""
        _forward(self._observer.on_agent_returned, key)

    def on_attempt_ended(self, key: RunKey) -> None:
        """Forwards the callback."""
        _forward(self._observer.on_attempt_ended, key)

    def on_fenced_off(self, key: RunKey) -> None:
        """Forwards the callback."""
        _forward(self._observer.on_fenced_off, key)

    def on_cancelled(
        self, request: CancelRequest, transition: Transition, receipt: Receipt
    ) -> None:
        """Forwards the callback."""
        _forward(self._observer.on_cancelled, request, transition, receipt)

    def agent_traceparent(self, key: RunKey, run: LaneRun) -> str:
        """Asks the observer; the caller's if it fails."""
        try:
            return self._observer.agent_traceparent(key, run)
        except Exception:
            log.exception("observer failed", callback="agent_traceparent", run_id=key.run_id)
            return run.trace


def _forward(callback: Callable[..., None], *given: Any) -> None:
    try:
        callback(*given)
    except Exception:
        name = getattr(callback, "__name__", "")
        log.exception("observer failed", callback=name)
