"""The calls of all clients, their answers, and the final state of the server.

All clients run in one process and share one counter: of two numbered events, the one with the
smaller number came first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from runlane import CancelReceipt, Message, Run, RunComplete, RunEvent, WhenBusy


class Outcome(StrEnum):
    """The outcome of a call as its client knows it."""

    OK = "ok"
    REFUSED = "refused"
    """The server refused the call and did nothing."""
    UNKNOWN = "unknown"
    """The answer was lost."""


@dataclass(frozen=True, slots=True)
class AcceptCall:
    """An accept, sent at `sent`. A later one with the same run id is a retry."""

    session_id: str
    run_id: str
    when_busy: WhenBusy
    max_attempts: int
    sent: int
    done: int
    outcome: Outcome
    error: str = ""
    run: Run | None = None
    cursor: str | None = None


@dataclass(frozen=True, slots=True)
class CancelCall:
    """A cancel. Its reason is unique, so each cancelled run shows which cancel covered it.

    `scope` is session, active, waiting, run or all. `answered_at` can be compared with times of
    the server, which is on the same machine.
    """

    scope: str
    session_id: str
    run_id: str
    reason: str
    sent: int
    done: int
    answered_at: datetime
    outcome: Outcome
    error: str = ""
    receipts: tuple[CancelReceipt, ...] = ()


@dataclass(slots=True)
class SubscriberRecord:
    """The events of a subscriber that always resumed from its last cursor.

    `session_id` is empty for a subscriber of all sessions. It started at the beginning, at the
    cursor of an accept (`after_accept_of`), or at the number `established`.
    """

    name: str
    session_id: str = ""
    from_beginning: bool = False
    after_accept_of: str = ""
    established: int = 0
    resumed: int = 0
    events: list[RunComplete] = field(default_factory=list)


@dataclass(slots=True)
class FollowerRecord:
    """The events of a follower of one run that always resumed after its last index."""

    run_id: str
    resumed: int = 0
    events: list[RunEvent] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Replay:
    """The events of a new subscription from a cursor that was received before the crash."""

    after: str
    events: Sequence[RunComplete]


@dataclass(slots=True)
class Final:
    """The state of the server after all runs have ended. `sentinels` are the very last runs."""

    listed: list[Run] = field(default_factory=list)
    runs: dict[str, Run] = field(default_factory=dict)
    log: list[RunComplete] = field(default_factory=list)
    events: dict[str, list[RunEvent]] = field(default_factory=dict)
    messages: dict[str, list[Message]] = field(default_factory=dict)
    replays: list[Replay] = field(default_factory=list)
    sentinels: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of one of several nodes, and the time of its end.

    A node that was ended is started again at the end of the fault.
    """

    node: int
    kind: str
    begun: datetime
    ended: datetime


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """An attempt as its agent recorded it: the node, and the time in which it worked.

    Without `ended` its node ended first. A `stubborn` agent may ignore its cancellation.
    """

    node: int
    session_id: str
    run_id: str
    attempt: int
    begun: datetime
    ended: datetime | None
    stubborn: bool = False


@dataclass(slots=True)
class History:
    """Everything of one round. With several nodes it has `faults` and `attempts`; the nodes declare
    each other dead after `lease` seconds. With workers, these keep their runs for `worker_lease`
    seconds."""

    accepts: list[AcceptCall] = field(default_factory=list)
    cancels: list[CancelCall] = field(default_factory=list)
    reads: list[Run] = field(default_factory=list)
    subscribers: list[SubscriberRecord] = field(default_factory=list)
    followers: list[FollowerRecord] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    attempts: list[AttemptRecord] = field(default_factory=list)
    lease: float = 0.0
    worker_lease: float = 0.0
    final: Final = field(default_factory=Final)

    @property
    def acknowledged(self) -> dict[str, list[AcceptCall]]:
        """The acknowledged accepts, by run id."""
        found: dict[str, list[AcceptCall]] = {}
        for attempt in self.accepts:
            if attempt.outcome is Outcome.OK:
                found.setdefault(attempt.run_id, []).append(attempt)
        return found

    @property
    def first_sent(self) -> dict[str, int]:
        """The number at which each run was sent first."""
        sent: dict[str, int] = {}
        for attempt in self.accepts:
            sent[attempt.run_id] = min(attempt.sent, sent.get(attempt.run_id, attempt.sent))
        return sent

    @property
    def unknown(self) -> set[str]:
        """The run ids with no acknowledged accept, and with at least one lost answer."""
        lost = {each.run_id for each in self.accepts if each.outcome is Outcome.UNKNOWN}
        return lost.difference(self.acknowledged)

    def save(self, path: Path) -> None:
        """Writes the history to a file, one record per line."""
        path.write_text("".join(f"{line}\n" for line in self._lines()))

    def _lines(self) -> Iterator[str]:
        calls = (self.accepts, self.cancels, self.reads, self.subscribers, self.followers)
        for records in (*calls, self.faults, self.attempts):
            for record in records:
                yield _line(type(record).__name__, asdict(record))
        for part in fields(self.final):
            yield _line(f"final {part.name}", asdict(self.final)[part.name])


def _line(kind: str, content: object) -> str:
    return json.dumps({"kind": kind, "content": content}, default=str)


Rule = Callable[[History], Iterator[str]]
"""A check of a history, which yields one line for each violation."""
