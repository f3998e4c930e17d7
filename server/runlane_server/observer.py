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

    def started(self, key: RunKey, run: LaneRun) -> None:
        """An attempt of a run became active here."""

    def left(self, key: RunKey) -> None:
        """The attempt that was active here is not any more, whatever became of the run."""

    def cancelled(self, asked: Asked, made: Transition, receipt: Receipt) -> None:
        """A cancel was carried out; `made` is what was committed along with it."""

    def called(self, method: str, code: str, reason: str, seconds: float | None) -> None:
        """A call ended, with a status code, and one of our reasons if there is one.

        `seconds` is None for streams: they last as long as the peer likes.
        """


NOBODY = Observer()
