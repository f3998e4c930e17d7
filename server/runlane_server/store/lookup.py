"""The filters and orders of the lists of runs and sessions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from runlane_server.core.model import NO_LABELS, Micros, Run, RunState, Session

ListPlace: TypeAlias = tuple[int, int]
"""The place of an item in a list: what the list is ordered by, and the item's number. Where the
number is the order, the first is 0."""

SCAN_ROWS = 20_000
"""Rows that a page reads at most. A page that finds too few among them is shorter, and names the
place where the next one continues."""

COUNT_ROWS = 100_000
"""Rows that a count reads at most."""


@dataclass(frozen=True, slots=True)
class Span:
    """A range of time: from `since`, included, to `until`, excluded; None is unbounded."""

    since: Micros | None = None
    until: Micros | None = None

    @property
    def is_bounded(self) -> bool:
        """Whether it excludes any time."""
        return self.since is not None or self.until is not None

    def has(self, at: Micros | None) -> bool:
        """Whether a time is in the range. None, for what has not happened, is in no bounded one."""
        if at is None:
            return not self.is_bounded
        return (self.since is None or at >= self.since) and (self.until is None or at < self.until)


ALWAYS = Span()


class RunOrder(StrEnum):
    """The order of a list of runs. A list by the end has no open runs."""

    LATEST_ACCEPTED = "latest_accepted"
    EARLIEST_ACCEPTED = "earliest_accepted"
    LATEST_ENDED = "latest_ended"
    EARLIEST_ENDED = "earliest_ended"

    @property
    def by_end(self) -> bool:
        """Whether runs are ordered by their end."""
        return self in {RunOrder.LATEST_ENDED, RunOrder.EARLIEST_ENDED}

    @property
    def is_descending(self) -> bool:
        """Whether the latest come first."""
        return self in {RunOrder.LATEST_ACCEPTED, RunOrder.LATEST_ENDED}


@dataclass(frozen=True, slots=True)
class RunFilter:
    """Selects runs. An empty or missing value selects all; `labels` are all required."""

    session_id: str | None = None
    states: frozenset[RunState] = frozenset()
    agent: str = ""
    labels: Mapping[str, str] = field(default_factory=lambda: NO_LABELS)
    accepted: Span = ALWAYS
    ended: Span = ALWAYS
    order: RunOrder = RunOrder.LATEST_ACCEPTED

    def matches(self, run: Run) -> bool:
        """Whether it selects a run."""
        return (
            self.session_id in {None, run.session_id}
            and (not self.states or run.state in self.states)
            and self.agent in {"", run.agent}
            and self.labels.items() <= run.metadata.items()
            and self.accepted.has(run.accepted_at)
            and self.ended.has(run.ended_at)
            and not (self.order.by_end and run.ended_at is None)
        )


@dataclass(frozen=True, slots=True)
class SessionFilter:
    """Selects sessions, in the order of their creation. A missing value selects all."""

    agent: str = ""
    labels: Mapping[str, str] = field(default_factory=lambda: NO_LABELS)
    busy: bool | None = None
    created: Span = ALWAYS
    is_descending: bool = True

    def matches(self, session: Session) -> bool:
        """Whether it selects a session."""
        return (
            self.agent in {"", session.agent}
            and self.labels.items() <= session.metadata.items()
            and self.busy in {None, session.busy}
            and self.created.has(session.created_at)
        )


ALL_RUNS = RunFilter()
ALL_SESSIONS = SessionFilter()


@dataclass(frozen=True, slots=True)
class Count:
    """The number of items in a list; `is_exact` is false if there may be more."""

    items: int
    is_exact: bool
