"""Sessions whose lanes are moved by the real rules and kept by the store under test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from runlane_server.core import lane as rules
from runlane_server.core.agents import DEFAULT_AGENT, AgentNames
from runlane_server.core.model import (
    NO_LABELS,
    Attachment,
    CancelScope,
    EventBody,
    FinishReason,
    Prompt,
    Role,
    RunComplete,
    RunError,
    RunEvent,
    RunKey,
    RunRequest,
    SessionKey,
    Text,
    Usage,
    WhenBusy,
)
from runlane_server.core.transition import Lane, Outcome, Transition
from runlane_server.core.turn import DraftMessage
from runlane_server.store.base import LoggedComplete, Store
from runlane_server.store.lane_log import LaneChange

TENANT = "tenant"
AGENTS = AgentNames((DEFAULT_AGENT, "a", "b"), DEFAULT_AGENT)
START = 1_700_000_000_000_000
RESERVATION = "reservation"
MANY = 1_000
PLENTY = 1 << 30


def request(
    run_id: str,
    text: str = "hello",
    *attachments: Attachment,
    when_busy: WhenBusy = WhenBusy.QUEUE,
    **metadata: str,
) -> RunRequest:
    """A request of that id and prompt."""
    return RunRequest(
        run_id, Prompt(text, attachments), when_busy, metadata=metadata or NO_LABELS, max_attempts=2
    )


def answer(text: str, usage: Usage = Usage(), *more: DraftMessage) -> Outcome:  # noqa: B008
    """A turn that ends well with that text."""
    said = DraftMessage(Role.ASSISTANT, (Text(text),))
    return Outcome(FinishReason.STOP, content=(*more, said), usage=usage, model="m")


@dataclass(slots=True)
class Story:
    """A session, its current lane, and what happened there."""

    store: Store
    session_id: str = "session"
    tenant: str = TENANT
    now: int = START
    lane: Lane = field(init=False)

    def __post_init__(self) -> None:
        self.lane = Lane(self.key)

    @property
    def key(self) -> SessionKey:
        return SessionKey(self.tenant, self.session_id)

    def run_key(self, run_id: str) -> RunKey:
        return RunKey(self.tenant, run_id)

    def tick(self) -> int:
        self.now += 1
        return self.now

    async def commit(self, transition: Transition) -> Any:
        """Commits a transition of the current lane; returns its reply."""
        base = self.lane.version
        if not transition.removed:
            transition = transition.at_version(base + 1)
        version = await self.store.commit(base, transition)
        self.lane = transition.lane._replace(version=version)
        return transition.reply

    def accepting(self, wanted: RunRequest) -> Transition:
        """The lane as accepting a run would make it."""
        reserved = rules.reserve(self.lane, RESERVATION, wanted.run_id).lane
        return rules.accept(
            reserved,
            wanted,
            at=self.tick(),
            token=RESERVATION,
            max_waiting=MANY,
            allow_missing=True,
            agents=AGENTS,
        )

    async def accept(self, *wanted: RunRequest | str) -> None:
        """Accepts runs, one after another."""
        for one in wanted:
            await self.commit(self.accepting(request(one) if isinstance(one, str) else one))

    async def start(self, host: str = "") -> RunKey:
        """Starts the run that is next, on that node."""
        run = await self.commit(rules.dispatch(self.lane, at=self.tick(), host=host))
        return self.run_key(run.run_id)

    def events(self, *bodies: EventBody) -> list[RunEvent]:
        """Those events as the next ones of the active run."""
        active = self.lane.active
        assert active is not None
        return [
            RunEvent(active.run_id, index, self.tick(), body)
            for index, body in enumerate(bodies, start=active.events + 1)
        ]

    async def append(self, *bodies: EventBody) -> None:
        """Adds events to the active run."""
        active = self.lane.active
        assert active is not None
        events = self.events(*bodies)
        await self.store.append(
            self.run_key(active.run_id), active.attempt, events, host=active.host
        )
        active = active._replace(events=events[-1].index)
        self.lane = self.lane._replace(active=active)

    async def fold(self) -> None:
        """Folds in what waits to be."""
        active = self.lane.active
        assert active is not None
        await self.commit(
            rules.drain_for_step(
                self.lane, active.run_id, active.attempt, at=self.tick(), events=active.events
            )
        )

    def finishing(self, outcome: Outcome) -> Transition:
        """The lane as the end of the active run would make it."""
        active = self.lane.active
        assert active is not None
        return rules.finish(
            self.lane,
            active.run_id,
            active.attempt,
            outcome,
            at=self.tick(),
            events=active.events,
        )

    async def finish(self, outcome: Outcome | str = "done") -> RunComplete:
        """Ends the active run."""
        ended = answer(outcome) if isinstance(outcome, str) else outcome
        complete = await self.commit(self.finishing(ended))
        assert isinstance(complete, RunComplete)
        return complete

    async def play(self, wanted: RunRequest | str, outcome: Outcome | str = "done") -> RunComplete:
        """A run from its acceptance to its end."""
        await self.accept(wanted)
        await self.start()
        return await self.finish(outcome)

    async def cancel(self, scope: CancelScope = CancelScope.SESSION, run_id: str = "") -> None:
        """Cancels in the session."""
        transition = rules.cancel(self.lane, scope, at=self.tick(), run_id=run_id, reason="enough")
        await self.commit(transition)

    async def lose_node(self) -> None:
        """The node of the active run is gone."""
        active = self.lane.active
        assert active is not None
        await self.commit(
            rules.node_lost(
                self.lane,
                active.run_id,
                active.attempt,
                at=self.tick(),
                content=(),
                events=active.events,
            )
        )

    async def fail_waiting(self, reason: str) -> None:
        """Ends what waits as failed."""
        await self.commit(
            rules.fail_waiting(self.lane, RunError(reason, "it failed"), at=self.tick())
        )

    async def remove(self) -> None:
        """Removes the session."""
        await self.commit(rules.remove(self.lane))


class Witness:
    """A listener that records its calls."""

    def __init__(self) -> None:
        self.log: list[LoggedComplete] = []
        self.runs: dict[RunKey, list[RunEvent]] = {}
        self.lanes: list[LaneChange] = []

    def on_completes(self, events: Sequence[LoggedComplete]) -> None:
        self.log += events

    def on_run_events(self, key: RunKey, events: Sequence[RunEvent]) -> None:
        self.runs.setdefault(key, []).extend(events)

    def on_lane(self, change: LaneChange) -> None:
        self.lanes.append(change)
