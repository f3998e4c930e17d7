"""The store that is gone with the process: for simulation, and to try things out.

No threads, no I/O, no clock: every call is done when it first runs.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from types import TracebackType
from typing import Self, TypeVar

from runlane_server.core.model import (
    Message,
    Micros,
    Prompt,
    Role,
    Run,
    RunComplete,
    RunEvent,
    RunKey,
    RunState,
    Session,
    SessionKey,
    Usage,
)
from runlane_server.core.transition import Lane, LaneRun, RunChange, Transition, describe
from runlane_server.store.base import (
    BusySession,
    EventFilter,
    IdleSession,
    Listener,
    LogPage,
    MessagePlace,
    NewSession,
    Page,
    Position,
    RunIdTaken,
    SessionTaken,
    Stale,
    StoreError,
    Watcher,
)
from runlane_server.store.codec import encode_parts
from runlane_server.store.memory.log import MemoryLog
from runlane_server.store.paging import (
    by_run,
    check_kept,
    event_size,
    fill,
    message_size,
    prompt_parts,
)
from runlane_server.store.weight import message_weight, run_weight

Item = TypeVar("Item")


@dataclass(slots=True)
class _Run:
    number: int
    run: Run
    prompt: Prompt
    events: list[RunEvent] = field(default_factory=list)


@dataclass(slots=True)
class _Session:
    number: int
    session: Session
    lane: Lane
    messages: list[Message] = field(default_factory=list)
    run_ids: list[str] = field(default_factory=list)
    stored_bytes: int = 0


class MemoryStore:
    """A store in memory. See `base.Store`.

    `store_id` may be given where a process must be repeatable.
    """

    def __init__(self, store_id: bytes | None = None) -> None:
        self.listener: Listener | None = None
        self.watcher: Watcher | None = None
        self.on_failure: Callable[[StoreError], None] | None = None
        self._store_id = os.urandom(8) if store_id is None else store_id
        self._sessions: dict[SessionKey, _Session] = {}
        self._runs: dict[RunKey, _Run] = {}
        self._log = MemoryLog()
        self._numbers = 0

    # Of the store as a whole

    @property
    def store_id(self) -> bytes:
        """8 random bytes that this store was given when it was made."""
        return self._store_id

    @property
    def cluster(self) -> None:
        """None: it is one node's own."""

    @property
    def position(self) -> Position:
        """The position of the last terminal event."""
        return self._log.position

    @property
    def behind(self) -> int:
        """0: it is one node's own."""
        return 0

    @property
    def compacted(self) -> Position:
        """Events up to here were removed."""
        return self._log.compacted

    @property
    def failed(self) -> StoreError | None:
        """Nothing: it cannot fail."""
        return None

    async def __aenter__(self) -> Self:
        """Does nothing."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Does nothing."""

    async def catch_up(self) -> None:
        """Does nothing: the listener was told of all."""

    # Writing

    async def commit(self, base_version: int, transition: Transition) -> int:
        """Writes a transition of a lane. Raises Stale and RunIdTaken."""
        key = transition.lane.key
        self._check(base_version, transition)
        if transition.removed:
            removed = self._sessions.pop(key)
            for run_id in removed.run_ids:
                del self._runs[RunKey(key.tenant, run_id)]
        else:
            self._apply(transition)
        self._tell(key.tenant, transition.completes, transition.events)
        return transition.lane.version

    async def append(self, key: RunKey, attempt: int, events: Sequence[RunEvent]) -> None:
        """Adds events to the active run. Raises Stale."""
        if not events:
            return
        kept = self._runs.get(key)
        if (
            kept is None
            or kept.run.state not in {RunState.ACTIVE, RunState.CANCELLING}
            or kept.run.folded_into
            or kept.run.attempt != attempt
            or kept.events[-1].index >= events[0].index
        ):
            raise Stale("the attempt is not the active one")
        kept.events += events
        session = self._sessions[SessionKey(key.tenant, kept.run.session_id)]
        session.lane = _with_events(session.lane, key.run_id, events[-1].index)
        self._tell(key.tenant, (), events)

    async def create_session(self, session: NewSession) -> None:
        """Creates a session. Raises SessionTaken."""
        if session.key in self._sessions:
            raise SessionTaken("a session of that id exists already")
        kept = self._new_session(Lane(session.key, version=1), session.created_at)
        kept.session = replace(kept.session, title=session.title, metadata=session.metadata)

    async def compact(self, before: Micros, limit: int, *, keep_bytes: int | None = None) -> int:
        """Removes the oldest terminal events from the log; returns how many."""
        removed = self._log.remove(before, limit, keep_bytes)
        for key in removed:
            kept = self._runs.get(key)
            # The id may have been used again, after the session of that run was deleted.
            if kept and kept.run.state.is_terminal and self._log.position_of(key) is None:
                del kept.events[:-1]
        return len(removed)

    def _check(self, base_version: int, transition: Transition) -> None:
        """Raises before anything is changed."""
        key = transition.lane.key
        kept = self._sessions.get(key)
        if base_version != (0 if kept is None else kept.lane.version):
            raise Stale("the lane is not at the version that the transition was made from")
        for change in transition.runs:
            known = RunKey(key.tenant, change.run.run_id) in self._runs
            if known and change.request is not None:
                raise RunIdTaken("a run of that id exists already")
        for event in transition.events:
            run = self._runs.get(RunKey(key.tenant, event.run_id))
            if run is not None and run.events[-1].index >= event.index:
                raise Stale("the events are not what the transition was made from")

    def _apply(self, transition: Transition) -> None:
        lane = transition.lane
        at = max((event.at for event in transition.events), default=0)
        kept = self._sessions.get(lane.key) or self._new_session(lane, at)
        kept.lane = lane._replace(reservations=())
        kept.messages += transition.messages
        kept.stored_bytes += message_weight(encode_parts(it.parts) for it in transition.messages)
        kept.messages.sort(key=_place)
        usage = sum((complete.usage for complete in transition.completes), start=kept.session.usage)
        kept.session = replace(
            kept.session,
            active_run_id="" if lane.active is None else lane.active.run_id,
            waiting_runs=len(lane.waiting),
            usage=usage,
            updated_at=max(kept.session.updated_at, at),
        )
        for change in transition.runs:
            self._change_run(kept, change)
        for event in transition.events:
            self._runs[RunKey(lane.key.tenant, event.run_id)].events.append(event)

    def _change_run(self, session: _Session, change: RunChange) -> None:
        key = RunKey(session.lane.key.tenant, change.run.run_id)
        if change.request is not None:
            run = describe(session.lane.key, change.run, change.request, change.complete)
            self._runs[key] = _Run(self._next_number(), run, change.request.prompt)
            session.run_ids.append(key.run_id)
            session.stored_bytes += run_weight(change.request)
            return
        kept = self._runs[key]
        kept.run = _changed(kept.run, change.run, change.complete)

    def _new_session(self, lane: Lane, at: Micros) -> _Session:
        session = Session(
            session_id=lane.key.session_id,
            title="",
            metadata={},
            active_run_id="",
            waiting_runs=0,
            usage=Usage(),
            created_at=at,
            updated_at=at,
        )
        kept = _Session(self._next_number(), session, lane)
        self._sessions[lane.key] = kept
        return kept

    def _next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _tell(
        self, tenant: str, completes: Sequence[RunComplete], events: Sequence[RunEvent]
    ) -> None:
        logged = [self._log.add(tenant, it, self._size_of_run(tenant, it)) for it in completes]
        if self.listener is None:
            return
        if logged:
            self.listener.completed(logged)
        for run_id, own in by_run(events):
            self.listener.happened(RunKey(tenant, run_id), own)

    def _size_of_run(self, tenant: str, complete: RunComplete) -> int:
        """How large the events of a run are that has just ended; none is left of a removed one."""
        kept = self._runs.get(RunKey(tenant, complete.run_id))
        return 0 if kept is None else sum(event_size(event) for event in kept.events[:-1])

    # Reading

    async def load_lane(self, key: SessionKey) -> Lane:
        """The lane of a session."""
        kept = self._sessions.get(key)
        return Lane(key) if kept is None else kept.lane

    async def busy_sessions(self) -> Sequence[BusySession]:
        """All sessions with runs that are not terminal, the longest waiting first."""
        lanes = [kept.lane for kept in self._sessions.values() if kept.lane.is_busy]
        lanes.sort(key=lambda lane: min(run.accepted_at for run in lane.runs))
        return [BusySession(lane.key, lane.active is not None, len(lane.waiting)) for lane in lanes]

    async def get_run(self, key: RunKey) -> Run | None:
        """A run, with the text of its end if it has ended."""
        kept = self._runs.get(key)
        return None if kept is None else kept.run

    async def position_of(self, key: RunKey) -> Position | None:
        """Where the terminal event of a run is in the log."""
        return self._log.position_of(key)

    async def list_runs(
        self,
        tenant: str,
        *,
        session_id: str | None = None,
        states: Collection[RunState] = (),
        after: int | None = None,
        limit: int,
    ) -> Page[Run, int]:
        """Runs, the latest accepted first."""
        session = None if session_id is None else self._sessions.get(SessionKey(tenant, session_id))
        ids: Iterable[RunKey] = reversed(self._runs)
        if session_id is not None:
            run_ids = [] if session is None else session.run_ids
            ids = (RunKey(tenant, run_id) for run_id in reversed(run_ids))
        kept = (self._runs[key] for key in ids if key.tenant == tenant)
        found = (
            (it.number, _without_text(it.run))
            for it in kept
            if not states or it.run.state in states
        )
        return _page(found, after, limit)

    async def get_prompt(self, key: RunKey) -> Prompt | None:
        """The prompt of a run."""
        kept = self._runs.get(key)
        return None if kept is None else kept.prompt

    async def run_events(
        self, key: RunKey, *, after: int, limit: int, max_bytes: int
    ) -> Sequence[RunEvent]:
        """The events of a run after an index."""
        kept = self._runs.get(key)
        events = [] if kept is None else kept.events
        first = bisect_right(events, after, key=lambda event: event.index)
        page = fill(events[first:], limit=limit, max_bytes=max_bytes, size=event_size)[0]
        check_kept(page, after)
        return page

    async def get_session(self, key: SessionKey) -> Session | None:
        """A session."""
        kept = self._sessions.get(key)
        return None if kept is None else kept.session

    async def list_sessions(
        self, tenant: str, *, after: int | None = None, limit: int
    ) -> Page[Session, int]:
        """Sessions, the latest created first."""
        found = (
            (kept.number, kept.session)
            for key, kept in reversed(self._sessions.items())
            if key.tenant == tenant
        )
        return _page(found, after, limit)

    async def stored_bytes(self, tenant: str) -> int:
        """About how many bytes a tenant has stored."""
        return sum(
            kept.stored_bytes for key, kept in self._sessions.items() if key.tenant == tenant
        )

    async def stale_sessions(self, before: Micros, limit: int) -> Sequence[IdleSession]:
        """Idle sessions that were last written to before."""
        stale = [
            kept
            for kept in self._sessions.values()
            if not kept.lane.is_busy and kept.session.updated_at < before
        ]
        stale.sort(key=lambda kept: kept.session.updated_at)
        return [
            IdleSession(kept.lane.key, kept.lane.version, kept.lane.accept_seq)
            for kept in stale[:limit]
        ]

    async def list_messages(
        self, key: SessionKey, *, after: MessagePlace | None = None, limit: int, max_bytes: int
    ) -> Page[Message, MessagePlace]:
        """The transcript after a place."""
        kept = self._sessions.get(key)
        messages = [] if kept is None else kept.messages
        first = bisect_right(messages, after or (0, 0), key=_place)
        page, more = fill(
            (self._whole(key.tenant, message) for message in messages[first:]),
            limit=limit,
            max_bytes=max_bytes,
            size=message_size,
        )
        return Page(tuple(page), _place(page[-1]) if more else None)

    async def log_bytes(self) -> int:
        """About how large the event log is."""
        return self._log.bytes

    async def completes(
        self, tenant: str, wanted: EventFilter, *, after: Position, limit: int, max_bytes: int
    ) -> LogPage:
        """Terminal events after a position, in order."""
        return self._log.page(tenant, wanted, after=after, limit=limit, max_bytes=max_bytes)

    def _whole(self, tenant: str, message: Message) -> Message:
        if message.role is not Role.USER:
            return message
        prompt = self._runs[RunKey(tenant, message.run_id)].prompt
        return message._replace(parts=prompt_parts(prompt))


def _changed(run: Run, by: LaneRun, complete: RunComplete | None) -> Run:
    return run._replace(
        state=by.state,
        attempt=by.attempt,
        started_at=by.started_at,
        ended_at=None if complete is None else complete.ended_at,
        folded_into=by.folded_into,
        complete=complete,
    )


def _with_events(lane: Lane, run_id: str, events: int) -> Lane:
    active = lane.active
    if active is None or active.run_id != run_id:
        return lane
    return lane._replace(active=active._replace(events=events))


def _without_text(run: Run) -> Run:
    if run.complete is None:
        return run
    return run._replace(complete=run.complete._replace(text="", text_truncated=False))


def _place(message: Message) -> MessagePlace:
    return message.turn, message.ordinal


def _page(
    latest_first: Iterable[tuple[int, Item]], after: int | None, limit: int
) -> Page[Item, int]:
    """A page of numbered items."""
    left = (numbered for numbered in latest_first if after is None or numbered[0] < after)
    page = list(islice(left, limit + 1))
    return Page(
        tuple(item for _, item in page[:limit]), page[limit - 1][0] if page[limit:] else None
    )
