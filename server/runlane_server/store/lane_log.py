"""The order of the events of a session (R52).

Each event that a transition commits has a place in the log of its lane: the version of the lane,
and the number of the event within the transition. Output of the agent in between has none; it
belongs after the event of its run with the next lower index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from runlane_server.core.artifact import ArtifactPiece
from runlane_server.core.model import (
    CustomEvent,
    EventBody,
    Micros,
    ReasoningDelta,
    RunEvent,
    SessionKey,
    StepResult,
    TextDelta,
    ToolCall,
    ToolResult,
)

LanePlace: TypeAlias = int
"""A place in the log of a lane."""

_BITS = 20
"""Of the number within a transition: no transition has a million events."""

_OUTPUT = (TextDelta, ReasoningDelta, ToolCall, ToolResult, ArtifactPiece, CustomEvent, StepResult)


def place_of(version: int, number: int) -> LanePlace:
    """The place of an event of the transition that led to a version; numbers count from 1."""
    return version << _BITS | number


def end_of(version: int) -> LanePlace:
    """The place after all events up to a version."""
    return place_of(version + 1, 0)


def version_of(place: LanePlace) -> int:
    """The version of the lane at a place."""
    return place >> _BITS


def is_output(body: EventBody) -> bool:
    """Whether an event is output of the agent, which has no place of its own."""
    return isinstance(body, _OUTPUT)


@dataclass(frozen=True, slots=True)
class LaneEntry:
    """An event at its place."""

    place: LanePlace
    event: RunEvent


@dataclass(frozen=True, slots=True)
class LanePage:
    """A page of the log of a lane.

    Events up to `start` may have been removed. `created_at` is that of the session, None if there
    is none: a later session with the same id has a log of its own.
    """

    entries: tuple[LaneEntry, ...] = ()
    start: LanePlace = 0
    created_at: Micros | None = None


@dataclass(frozen=True, slots=True)
class LaneChange:
    """A commit that led a lane from version `base` to `version`; 0: there is no session."""

    key: SessionKey
    base: int
    version: int
    events: tuple[RunEvent, ...] = ()

    @property
    def entries(self) -> tuple[LaneEntry, ...]:
        """The events that have a place."""
        return entries_of(self.version, self.events)


def entries_of(version: int, events: Sequence[RunEvent]) -> tuple[LaneEntry, ...]:
    """The events of a transition that have a place."""
    return tuple(
        LaneEntry(place_of(version, number), event)
        for number, event in enumerate(events, start=1)
        if not is_output(event.body)
    )
