"""What can be seen of a node: what it has to do, and what comes of things.

The parts of a node tell an observer; by default it is somebody who does not care.

What is told here is committed, or decided for good: nobody is told of what might be taken back.
"""

from __future__ import annotations

from typing import NamedTuple

from runlane_server.core.model import Micros, RunKey, SessionKey
from runlane_server.core.transition import LaneRun, Receipt, Transition


class CancelRequest(NamedTuple):
    """A cancel, as it was asked for: of what, in which session, and when."""

    key: SessionKey
    scope: str
    at: Micros


class Load(NamedTuple):
    """How many runs have an agent at work on a node, how many wait, how many slots are taken, and
    whether the node takes no new runs."""

    active: int
    waiting: int
    slots_in_use: int
    draining: bool


class Observer:
    """Does nothing about anything. Whoever wants to know overrides what he wants to know."""

    __slots__ = ()

    def on_accepted(self, key: RunKey, run: LaneRun, called_at: Micros) -> None:
        """A new run is durable; the call for it began at `called_at`."""

    def on_lane_changed(self, key: SessionKey, made: Transition) -> None:
        """This node has changed a lane, durably."""

    def on_attempt_started(self, key: RunKey, run: LaneRun) -> None:
        """An attempt of a run became active here."""

    def on_agent_returned(self, key: RunKey) -> None:
        """The agent of the attempt that is active here is at its end; that is to be written now,
        for which it may take several tries."""

    def on_attempt_ended(self, key: RunKey) -> None:
        """The attempt that was active here is not any more, whatever became of the run."""

    def on_cancelled(self, asked: CancelRequest, made: Transition, receipt: Receipt) -> None:
        """A cancel was carried out; `made` is what was committed along with it."""

    def on_call_ended(self, method: str, code: str, reason: str, seconds: float | None) -> None:
        """A call ended, with a status code, and one of our reasons if there is one.

        `seconds` is None for streams: they last as long as the peer likes.
        """

    def agent_traceparent(self, key: RunKey, run: LaneRun) -> str:
        """The place in a trace that the agent of an attempt is given (see `core.trace`): where the
        caller is, if nobody knows better; empty for none."""
        return run.trace


NO_OBSERVER = Observer()


class ObserverPair(Observer):
    """Tells two observers. What the agent is given is for the second to say."""

    __slots__ = ("_first", "_second")

    def __init__(self, first: Observer, second: Observer) -> None:
        self._first = first
        self._second = second

    def on_accepted(self, key: RunKey, run: LaneRun, called_at: Micros) -> None:
        """Tells both."""
        self._first.on_accepted(key, run, called_at)
        self._second.on_accepted(key, run, called_at)

    def on_lane_changed(self, key: SessionKey, made: Transition) -> None:
        """Tells both."""
        self._first.on_lane_changed(key, made)
        self._second.on_lane_changed(key, made)

    def on_attempt_started(self, key: RunKey, run: LaneRun) -> None:
        """Tells both."""
        self._first.on_attempt_started(key, run)
        self._second.on_attempt_started(key, run)

    def on_agent_returned(self, key: RunKey) -> None:
        """Tells both."""
        self._first.on_agent_returned(key)
        self._second.on_agent_returned(key)

    def on_attempt_ended(self, key: RunKey) -> None:
        """Tells both."""
        self._first.on_attempt_ended(key)
        self._second.on_attempt_ended(key)

    def on_cancelled(self, asked: CancelRequest, made: Transition, receipt: Receipt) -> None:
        """Tells both."""
        self._first.on_cancelled(asked, made, receipt)
        self._second.on_cancelled(asked, made, receipt)

    def on_call_ended(self, method: str, code: str, reason: str, seconds: float | None) -> None:
        """Tells both."""
        self._first.on_call_ended(method, code, reason, seconds)
        self._second.on_call_ended(method, code, reason, seconds)

    def agent_traceparent(self, key: RunKey, run: LaneRun) -> str:
        """Asks the second."""
        return self._second.agent_traceparent(key, run)
