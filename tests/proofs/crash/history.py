"""What clients sent, what they were answered, and what was there in the end.

All clients live in one process and share one counter, so that of two things with numbers the one
with the smaller number came first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from runlane import CancelReceipt, Message, Run, RunComplete, RunEvent, WhenBusy


class Outcome(StrEnum):
    """What a client knows of a call."""

    OK = "ok"
    REFUSED = "refused"
    """The server said that it did nothing."""
    UNKNOWN = "unknown"
    """The answer was lost."""


@dataclass(frozen=True, slots=True)
class AcceptTry:
    """An accept, sent at `sent`; a later one of the same run id is a retry."""

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
class CancelTry:
    """A cancel. Its reason is its own, so every run tells by which cancel it was covered.

    `scope` is session, active, waiting, run or all; `answered_at` is on the server's clock too, as
    both are on one machine.
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
class Heard:
    """What a subscriber heard that always resumed where it was.

    `session_id` is empty for one of all sessions. It began at the beginning, or at the cursor of
    an accept (`after_accept_of`), or in the instant `established`.
    """

    name: str
    session_id: str = ""
    from_beginning: bool = False
    after_accept_of: str = ""
    established: int = 0
    resumed: int = 0
    events: list[RunComplete] = field(default_factory=list)


@dataclass(slots=True)
class Followed:
    """What a follower of one run saw that always resumed after the last index it had."""

    run_id: str
    resumed: int = 0
    events: list[RunEvent] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Replay:
    """What a new subscription gave from a cursor on that came with an event before the crash."""

    after: str
    events: Sequence[RunComplete]


@dataclass(slots=True)
class Final:
    """What the server has when everything has ended. `sentinels` are the last runs of all."""

    listed: list[Run] = field(default_factory=list)
    runs: dict[str, Run] = field(default_factory=dict)
    log: list[RunComplete] = field(default_factory=list)
    events: dict[str, list[RunEvent]] = field(default_factory=dict)
    messages: dict[str, list[Message]] = field(default_factory=dict)
    replays: list[Replay] = field(default_factory=list)
    sentinels: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Fault:
    """What was done to one of several nodes, and until when it lasted.

    A node that was ended is started anew at the end of the fault.
    """

    node: int
    kind: str
    begun: datetime
    ended: datetime


@dataclass(frozen=True, slots=True)
class Work:
    """What an agent itself tells of an attempt: on which node, and from when to when it worked.

    Without `ended` its node ended first. One that is `stubborn` may ignore that it is to stop.
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
    """All of one round. `faults` and `works` are there where it has several nodes, which take each
    other for lost after `lease` seconds."""

    accepts: list[AcceptTry] = field(default_factory=list)
    cancels: list[CancelTry] = field(default_factory=list)
    looks: list[Run] = field(default_factory=list)
    heard: list[Heard] = field(default_factory=list)
    followed: list[Followed] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    lease: float = 0.0
    final: Final = field(default_factory=Final)

    @property
    def acknowledged(self) -> dict[str, list[AcceptTry]]:
        """The accepts that were answered, by run id."""
        found: dict[str, list[AcceptTry]] = {}
        for attempt in self.accepts:
            if attempt.outcome is Outcome.OK:
                found.setdefault(attempt.run_id, []).append(attempt)
        return found

    @property
    def first_sent(self) -> dict[str, int]:
        """When each run was sent first."""
        sent: dict[str, int] = {}
        for attempt in self.accepts:
            sent[attempt.run_id] = min(attempt.sent, sent.get(attempt.run_id, attempt.sent))
        return sent

    @property
    def unknown(self) -> set[str]:
        """The run ids of which no accept was answered, and one at least got no answer."""
        lost = {each.run_id for each in self.accepts if each.outcome is Outcome.UNKNOWN}
        return lost.difference(self.acknowledged)

    def save(self, path: Path) -> None:
        """Writes all of it down, a record a line."""
        path.write_text("".join(f"{line}\n" for line in self._lines()))

    def _lines(self) -> Iterator[str]:
        told = (self.accepts, self.cancels, self.looks, self.heard, self.followed)
        for records in (*told, self.faults, self.works):
            for record in records:
                yield _line(type(record).__name__, asdict(record))
        for part in fields(self.final):
            yield _line(f"final {part.name}", asdict(self.final)[part.name])


def _line(kind: str, content: object) -> str:
    return json.dumps({"kind": kind, "content": content}, default=str)
