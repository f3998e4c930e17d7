"""What the lanes ask of the node that they are on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from runlane_server.core.model import RunRequest, SessionKey
from runlane_server.core.transition import LaneRun, Transition


class Actions(Protocol):
    """What is done about a transition once it is committed."""

    def committed(self, key: SessionKey, made: Transition) -> None:
        """It is committed; what is done about it comes next."""

    def started(self, key: SessionKey, run: LaneRun, request: RunRequest | None) -> None:
        """A run became active here; with its request where that is at hand."""

    def cancelling(self, key: SessionKey, run: LaneRun) -> bool:
        """The active run is covered by a cancel, which may be still to be committed. Returns
        whether its agent, which is told to stop, is at work here."""

    def runs_here(self, key: SessionKey, run: LaneRun) -> bool:
        """Whether that attempt has an agent at work here."""

    def left_waiting(self) -> None:
        """A lane has a run to start, and this node has no slot for it."""


class Host(Protocol):
    """Which node this is, among those that share the store."""

    @property
    def node_id(self) -> str:
        """What it is called; empty if the store is its own."""

    @property
    def alive(self) -> bool:
        """Whether it may start runs."""


@dataclass(frozen=True, slots=True)
class Alone:
    """The only node of its store."""

    node_id: str = ""
    alive: bool = True
