"""A reader of a session for tests: what a stream said, and what it should have said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from runlane_server.core.model import RunEvent, RunKey, Started
from runlane_server.feed.feed import Feed
from runlane_server.feed.sessions import (
    QueueChanged,
    SessionChanged,
    SessionPlace,
    SessionStream,
    Snapshot,
    Step,
)
from runlane_server.store.base import Store
from runlane_server.store.lane_log import LaneEntry
from support.story import PLENTY, TENANT


@contextmanager
def streaming(
    feed: Feed,
    *session_ids: str,
    tenant: str = TENANT,
    at: SessionPlace | None = None,
    with_deltas: bool = True,
) -> Iterator[SessionStream]:
    """A stream of sessions, from snapshots or from one position."""
    stream = SessionStream(
        feed,
        tenant,
        dict.fromkeys(session_ids, at),
        with_deltas=with_deltas,
        relayed=lambda _: nullcontext(),
    )
    try:
        yield stream
    finally:
        stream.close()


async def drain(stream: SessionStream) -> list[Step]:
    """All steps that are there, of all sessions."""
    steps: list[Step] = []
    while (found := await stream.next(0)) is not None:
        steps += found[1]
    return steps


@dataclass
class Picture:
    """The knowledge of a client that reads all steps of one session in order."""

    snapshots: int = 0
    known: dict[str, list[RunEvent]] = field(default_factory=dict)
    events: list[RunEvent] = field(default_factory=list)
    queue: list[str] = field(default_factory=list)
    open_inputs: set[str] = field(default_factory=set)
    active_run_id: str = ""
    deleted: int = 0
    exists: bool = False

    def take(self, steps: Sequence[Step]) -> None:
        """Adds steps. An event that is doubled or left out fails."""
        for step in steps:
            match step.item:
                case Snapshot() as part:
                    self._take_snapshot(part)
                case RunEvent() as event:
                    self._take_event(event)
                case SessionChanged(session, _):
                    self.exists = session is not None
                    self.deleted += session is None
                    self.active_run_id = session.active_run_id if session else ""
                    if session is None:
                        self.queue = []
                case QueueChanged(run_ids, runs):
                    self.queue = list(run_ids)
                    assert {run.run_id for run in runs} <= set(run_ids)

    def _take_snapshot(self, part: Snapshot) -> None:
        self.snapshots += not part.continues
        if part.session is not None:
            self.exists = True
            self.active_run_id = part.session.active_run_id
        for event in part.output:
            self.known.setdefault(event.run_id, []).append(event)
        self.queue += [run.run_id for run in part.queue]
        self.open_inputs |= {request.input_request_id for request in part.inputs}

    def _take_event(self, event: RunEvent) -> None:
        self.events.append(event)
        own = self.known.setdefault(event.run_id, [])
        if own:
            assert event.index == own[-1].index + 1, f"{event} follows {own[-1]}"
        own.append(event)


async def run_events(store: Store, run_id: str, tenant: str = TENANT) -> Sequence[RunEvent]:
    """All events of a run."""
    return await store.run_events(RunKey(tenant, run_id), after=0, limit=10_000, max_bytes=PLENTY)


def in_order(events: Sequence[RunEvent], log: Sequence[LaneEntry]) -> None:
    """Checks that the events with a place come in the order of the lane (R52), and that all output
    of a run comes before the start of the next one."""
    places = {(it.event.run_id, it.event.index): it.place for it in log}
    found = [place for it in events if (place := places.get((it.run_id, it.index)))]
    assert found == sorted(set(found))
    active = ""
    for event in events:
        if isinstance(event.body, Started):
            active = event.run_id
        elif (event.run_id, event.index) not in places:
            assert event.run_id == active or not active, f"output of {event.run_id} is late"
