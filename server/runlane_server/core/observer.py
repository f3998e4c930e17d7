"""The interface through which metrics and traces observe a node.

Every callback reports something that is committed or final: an observer never sees what might be
rolled back.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from runlane_server.core.model import Micros, RunKey, SessionKey
from runlane_server.core.transition import LaneRun, Receipt, Transition


class CancelRequest(NamedTuple):
    """A cancel as it was requested: the session, the scope, and the time of the request."""

    key: SessionKey
    scope: str
    at: Micros


class Load(NamedTuple):
    """The load of a node: runs whose agent is at work, waiting runs, and slots in use. A node that
    is `draining` accepts no new runs. `active_by_agent` has all agents that the node declares."""

    active: int
    waiting: int
    slots_in_use: int
    draining: bool
    active_by_agent: Mapping[str, int] = MappingProxyType({})


class Observer:
    """Base class with no-op callbacks; override the ones you need."""

    __slots__ = ()

    def on_accepted(self, key: RunKey, run: LaneRun, called_at: Micros) -> None:
        """A new run is durable; its RunAccepted call began at `called_at`."""

    def on_lane_changed(self, key: SessionKey, transition: Transition) -> None:
        """This node committed a transition of a lane."""

    def on_attempt_started(self, key: RunKey, run: LaneRun) -> None:
        """An attempt of a run became active on this node."""

    def on_agent_returned(self, key: RunKey) -> None:
        """The agent of the active attempt has ended, and its end is about to be committed.

        Called once for each try to commit it.
        """

    def on_attempt_ended(self, key: RunKey) -> None:
        """An attempt is no longer active on this node; the run may have ended, or not."""

    def on_fenced_off(self, key: RunKey) -> None:
        """Code of a stopped attempt did not return within the grace period (R9)."""

    def on_cancelled(
        self, request: CancelRequest, transition: Transition, receipt: Receipt
    ) -> None:
        """A cancel was committed, as part of `transition`."""

    def on_loop_blocked(self) -> None:
        """Code held the event loop of this node for more than 200 ms, and has let it go."""

    def on_call_ended(self, method: str, code: str, reason: str, seconds: float | None) -> None:
        """A call ended with a status code and, if it failed with one of ours, an error reason.

        `seconds` is None for streams: their duration is up to the peer.
        """

    def agent_traceparent(self, key: RunKey, run: LaneRun) -> str:
        """The `traceparent` to pass to the agent of an attempt (see `core.trace`), empty for none.

        By default the caller's.
        """
        return run.trace


NO_OBSERVER = Observer()


class ObserverPair(Observer):
    """Forwards each callback to two observers. The second one provides the `traceparent`."""

    __slots__ = ("_first", "_second")

    def __init__(self, first: Observer, second: Observer) -> None:
        self._first = first
        self._second = second

    def on_accepted(self, key: RunKey, run: LaneRun, called_at: Micros) -> None:
        """Forwards to both."""
        self._first.on_accepted(key, run, called_at)
        self._second.on_accepted(key, run, called_at)

    def on_lane_changed(self, key: SessionKey, transition: Transition) -> None:
        """Forwards to both."""
        self._first.on_lane_changed(key, transition)
        self._second.on_lane_changed(key, transition)

    def on_attempt_started(self, key: RunKey, run: LaneRun) -> None:
        """Forwards to both."""
        self._first.on_attempt_started(key, run)
        self._second.on_attempt_started(key, run)

    def on_agent_returned(self, key: RunKey) -> None:
        """Forwards to both."""
        self._first.on_agent_returned(key)
        self._second.on_agent_returned(key)

    def on_attempt_ended(self, key: RunKey) -> None:
        """Forwards to both."""
        self._first.on_attempt_ended(key)
        self._second.on_attempt_ended(key)

    def on_fenced_off(self, key: RunKey) -> None:
        """Forwards to both."""
        self._first.on_fenced_off(key)
        self._second.on_fenced_off(key)

    def on_cancelled(
        self, request: CancelRequest, transition: Transition, receipt: Receipt
    ) -> None:
        """Forwards to both."""
        self._first.on_cancelled(request, transition, receipt)
        self._second.on_cancelled(request, transition, receipt)

    def on_loop_blocked(self) -> None:
        """Forwards to both."""
        self._first.on_loop_blocked()
        self._second.on_loop_blocked()

    def on_call_ended(self, method: str, code: str, reason: str, seconds: float | None) -> None:
        """Forwards to both."""
        self._first.on_call_ended(method, code, reason, seconds)
        self._second.on_call_ended(method, code, reason, seconds)

    def agent_traceparent(self, key: RunKey, run: LaneRun) -> str:
        """Asks the second observer."""
        return self._second.agent_traceparent(key, run)
