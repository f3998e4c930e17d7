"""What can be seen of a node: what it has to do, and what comes of things.

The parts of a node tell an observer; by default it is somebody who does not care.

What is told here is committed, or decided for good: nobody is told of what might be taken back.
"""

from __future__ import annotations

from typing import NamedTuple

from runlane_server.core.model import Micros, RunKey, SessionKey
from runlane_server.core.transition import LaneRun, Receipt, Transition


class Asked(NamedTuple):
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
    refusing: bool


class Observer:
    """Does nothing about anything. Whoever wants to know overrides what he wants to know."""

    __slots__ = ()

    def accepted(self, key: RunKey, run: LaneRun, called_at: Micros) -> None:
        """A new run is durable; the call for it began at `called_at`."""

    def changed(self, key: SessionKey, made: Transition) -> None:
        """This node has changed a lane, durably."""

    def started(self, key: RunKey, run: LaneRun) -> None:
        """An attempt of a run became active here."""

    def returned(self, key: RunKey) -> None:
        """The agent of the attempt that is active here is at its end; that is to be written now,
        for which it may take several tries."""

    def left(self, key: RunKey) -> None:
        """The attempt that was active here is not any more, whatever became of the run."""

    def cancelled(self, asked: Asked, made: Transition, receipt: Receipt) -> None:
        """A cancel was carried out; `made` is what was committed along with it."""

    def called(self, method: str, code: str, reason: str, seconds: float | None) -> None:
        """A call ended, with a status code, and one of our reasons if there is one.

        `seconds` is None for streams: they last as long as the peer likes.
        """

    def handed(self, key: RunKey, run: LaneRun) -> str:
        """The place in a trace that the agent of an attempt is given (see `core.trace`): where the
        caller is, if nobody knows better; empty for none."""
        return run.trace


NOBODY = Observer()


class Both(Observer):
    """Tells two observers. What the agent is given is for the second to say."""

    __slots__ = ("_first", "_second")

    def __init__(self, first: Observer, second: Observer) -> None:
        self._first = first
        self._second = second

    def accepted(self, key: RunKey, run: LaneRun, called_at: Micros) -> None:
        """Tells both."""
        self._first.accepted(key, run, called_at)
        self._second.accepted(key, run, called_at)

    def changed(self, key: SessionKey, made: Transition) -> None:
        """Tells both."""
        self._first.changed(key, made)
        self._second.changed(key, made)

    def started(self, key: RunKey, run: LaneRun) -> None:
        """Tells both."""
        self._first.started(key, run)
        self._second.started(key, run)

    def returned(self, key: RunKey) -> None:
        """Tells both."""
        self._first.returned(key)
        self._second.returned(key)

    def left(self, key: RunKey) -> None:
        """Tells both."""
        self._first.left(key)
        self._second.left(key)

    def cancelled(self, asked: Asked, made: Transition, receipt: Receipt) -> None:
        """Tells both."""
        self._first.cancelled(asked, made, receipt)
        self._second.cancelled(asked, made, receipt)

    def called(self, method: str, code: str, reason: str, seconds: float | None) -> None:
        """Tells both."""
        self._first.called(method, code, reason, seconds)
        self._second.called(method, code, reason, seconds)

    def handed(self, key: RunKey, run: LaneRun) -> str:
        """Asks the second."""
        return self._second.handed(key, run)
