"""The store in memory, which ends with its process: for simulations, tests and trials.

No threads, no I/O and no clock: every call completes without waiting.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import chain, islice
from types import TracebackType
from typing import Self, TypeVar

from runlane_server.core.input import InputRequest, InputState
from runlane_server.core.model import (
    Message,
    Micros,
    Part,
    Prompt,
    Run,
    RunComplete,
    RunEvent,
    RunKey,
    RunState,
    Session,
    SessionKey,
)
from runlane_server.core.transition import Lane, Transition
from runlane_server.store.base import (
    BusySession,
    DeletedRun,
    DueInput,
    EventFilter,
    IdleSession,
    Listener,
    LogPage,
    MessagePlace,
    NewSession,
    Page,
    Position,
    StoreError,
    WriteObserver,
)
from runlane_server.store.copies import CopyPlan, MessagesPiece
from runlane_server.store.corrupt import corrupt_complete
from runlane_server.store.fanout import publish_completes, publish_lane, publish_run_events
from runlane_server.store.lane_log import LaneChange, LanePage, LanePlace
from runlane_server.store.lookup import (
    ALL_RUNS,
    ALL_SESSIONS,
    Count,
    ListPlace,
    RunFilter,
    SessionFilter,
)
from runlane_server.store.memory.lists import (
    list_runs,
    list_sessions,
    matching_runs,
    matching_sessions,
)
from runlane_server.store.memory.log import MemoryLog
from runlane_server.store.memory.tables import Tables, place_of
from runlane_server.store.memory.webhooks import MemoryWebhooks
from runlane_server.store.paging import (
    check_not_compacted,
    entry_size,
    event_size,
    message_size,
    messages_page,
    numbered_page,
    take_page,
)
from runlane_server.store.vitals import StoreVitals
from runlane_server.store.weight import SESSION_BYTES

Item = TypeVar("Item")


class MemoryStore:
    """A store in memory. See `base.Store`.

    `store_id` may be given where a process must be repeatable.
    """

    def __init__(self, store_id: bytes | None = None) -> None:
        self.listener: Listener | None = None
        self.write_observer: WriteObserver | None = None
        self.on_failure: Callable[[StoreError], None] | None = None
        self._store_id = os.urandom(8) if store_id is None else store_id
        self._tables = Tables()
        self._log = MemoryLog()
        self._webhooks = MemoryWebhooks(self._tables.input_request)

    # The store as a whole

    @property
    def store_id(self) -> bytes:
        return self._store_id

    @property
    def cluster(self) -> None:
        """None: only one node can use it."""

    @property
    def webhooks(self) -> MemoryWebhooks:
        return self._webhooks

    @property
    def position(self) -> Position:
        return self._log.position

    @property
    def behind(self) -> int:
        """0: only one node can use it."""
        return 0

    @property
    def compacted(self) -> Position:
        return self._log.compacted.latest

    def compacted_of(self, tenant: str) -> Position:
        return self._log.compacted.of(tenant)

    @property
    def failed(self) -> StoreError | None:
        """None: it cannot fail."""
        return None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Does nothing."""

    async def catch_up(self) -> None:
        """Does nothing: the listener has received everything."""

    # Writing

    async def commit(self, base_version: int, transition: Transition) -> int:
        self._tables.commit(base_version, transition)
        tenant = transition.lane.key.tenant
        self._webhooks.note_inputs(tenant, transition.inputs, self._log.position)
        self._publish(tenant, transition.completes, transition.events)
        version = 0 if transition.removed else transition.lane.version
        change = LaneChange(transition.lane.key, base_version, version, transition.events)
        publish_lane(self.listener, change)
        return transition.lane.version

    async def append(
        self, key: RunKey, attempt: int, events: Sequence[RunEvent], *, host: str = ""
    ) -> None:
        if events:
            self._tables.append(key, attempt, host, events)
            self._publish(key.tenant, (), events)

    async def keep_part(
        self, key: RunKey, attempt: int, number: int, part: Part, *, host: str = ""
    ) -> None:
        self._tables.keep_part(key, attempt, host, number, part)

    async def discard(self, key: SessionKey, at: Micros) -> None:
        row = self._tables.sessions.get(key)
        if row is None:
            return
        completes = [
            corrupt_complete(key.session_id, run.run_id, accept_seq=run.accept_seq, ended_at=at)
            for run in row.lane.runs
        ]
        self._tables.remove(key)
        self._publish(key.tenant, completes, ())
        publish_lane(self.listener, LaneChange(key, 0, 0))

    async def create_session(self, session: NewSession) -> None:
        self._tables.create_session(session)
        publish_lane(self.listener, LaneChange(session.key, 0, 1))

    async def plan_copy(self, key: SessionKey, turn: int) -> CopyPlan | None:
        row = self._tables.sessions.get(key)
        if row is None:
            return None
        whole = MessagesPiece(0, (0, 0), (turn, 0), self._tables.transcript_size(key, turn))
        return CopyPlan(key, turn, row.number, row.session.created_at, (whole,))

    async def fork_session(self, plan: CopyPlan, session: NewSession) -> None:
        self._tables.fork_session(plan, session)
        publish_lane(self.listener, LaneChange(session.key, 0, 1))

    async def edit_session(self, key: SessionKey, before: Session, after: Session) -> bool:
        version = self._tables.edit_session(key, before, after)
        if version:
            publish_lane(self.listener, LaneChange(key, version - 1, version))
        return version > 0

    async def compact(self, before: Micros, limit: int, *, keep_bytes: int | None = None) -> int:
        removed = self._log.remove(before, limit, keep_bytes)
        for key in removed:
            row = self._tables.runs.get(key)
            # The id may be in use again, after the session of the removed run was deleted.
            if row and row.run.state.is_terminal and self._log.position_of(key) is None:
                self._tables.trim(key)
        return len(removed)

    def _publish(
        self, tenant: str, completes: Sequence[RunComplete], events: Sequence[RunEvent]
    ) -> None:
        logged = [
            self._log.add(tenant, it, self._tables.events_size(RunKey(tenant, it.run_id)))
            for it in completes
        ]
        if logged:
            publish_completes(self.listener, logged)
        publish_run_events(self.listener, tenant, events)

    async def forget_deleted(self, before: Micros, limit: int) -> int:
        return self._tables.forget_deleted(before, limit)

    async def remove_deleted(self) -> bool:
        return self._tables.remove_deleted()

    # Reading

    async def load_lane(self, key: SessionKey) -> Lane:
        return self._tables.lane(key)

    async def busy_sessions(self) -> Sequence[BusySession]:
        lanes = [row.lane for row in self._tables.sessions.values() if row.lane.is_busy]
        lanes.sort(key=lambda lane: min(run.accepted_at for run in lane.runs))
        return [_busy(lane) for lane in lanes]

    async def get_run(self, key: RunKey) -> Run | None:
        row = self._tables.shown(key)
        return None if row is None else row.shown

    async def get_deleted_run(self, key: RunKey) -> DeletedRun | None:
        return self._tables.deleted_run(key)

    async def position_of(self, key: RunKey) -> Position | None:
        return self._log.position_of(key)

    async def list_runs(
        self,
        tenant: str,
        wanted: RunFilter = ALL_RUNS,
        *,
        after: ListPlace | None = None,
        limit: int,
    ) -> Page[Run, ListPlace]:
        return list_runs(self._tables, tenant, wanted, after, limit)

    async def count_runs(self, tenant: str, wanted: RunFilter) -> Count:
        return Count(len(matching_runs(self._tables, tenant, wanted)), is_exact=True)

    async def get_prompt(self, key: RunKey) -> Prompt | None:
        row = self._tables.runs.get(key)
        return None if row is None else row.prompt

    async def run_events(
        self, key: RunKey, *, after: int, limit: int, max_bytes: int
    ) -> Sequence[RunEvent]:
        row = self._tables.shown(key)
        events = [] if row is None else row.events
        first = bisect_right(events, after, key=lambda event: event.index)
        page, _ = take_page(events[first:], limit=limit, max_bytes=max_bytes, size=event_size)
        check_not_compacted(page, after)
        return page

    async def lane_events(
        self, key: SessionKey, *, after: LanePlace, limit: int, max_bytes: int
    ) -> LanePage:
        row = self._tables.sessions.get(key)
        if row is None:
            return LanePage()
        first = bisect_right(row.log, after, key=lambda entry: entry.place)
        page, _ = take_page(row.log[first:], limit=limit, max_bytes=max_bytes, size=entry_size)
        return LanePage(tuple(page), row.log_start, row.session.created_at)

    async def get_input(self, tenant: str, input_request_id: str) -> InputRequest | None:
        return self._tables.input_request(tenant, input_request_id)

    async def find_input(self, key: RunKey, question_key: str) -> InputRequest | None:
        for (tenant, _), row in reversed(self._tables.inputs.items()):
            request = row.request
            if (tenant, request.run_id, request.question.key) == (*key, question_key):
                return request
        return None

    async def list_inputs(
        self,
        tenant: str,
        *,
        session_id: str | None = None,
        run_id: str | None = None,
        states: Collection[InputState] = (),
        after: int | None = None,
        limit: int,
    ) -> Page[InputRequest, int]:
        found = (
            (row.number, row.request)
            for (owner, _), row in reversed(self._tables.inputs.items())
            if owner == tenant
            and session_id in {None, row.request.session_id}
            and run_id in {None, row.request.run_id}
            and (not states or row.request.state in states)
            and not self._tables.is_removed(owner, row.request.session_id)
        )
        return _page(found, after, limit)

    async def due_inputs(self, now: Micros, limit: int) -> Sequence[DueInput]:
        due = [
            (row.request.expires_at, tenant, row.request)
            for (tenant, _), row in self._tables.inputs.items()
            if row.request.state is InputState.OPEN
            and row.request.expires_at is not None
            and row.request.expires_at <= now
        ]
        due.sort(key=lambda one: one[0])
        return [
            DueInput(SessionKey(tenant, it.session_id), it.run_id, it.input_request_id)
            for _, tenant, it in due[:limit]
        ]

    async def get_session(self, key: SessionKey) -> Session | None:
        row = self._tables.sessions.get(key)
        return None if row is None else row.session

    async def list_sessions(
        self,
        tenant: str,
        wanted: SessionFilter = ALL_SESSIONS,
        *,
        after: ListPlace | None = None,
        limit: int,
    ) -> Page[Session, ListPlace]:
        return list_sessions(self._tables, tenant, wanted, after, limit)

    async def count_sessions(self, tenant: str, wanted: SessionFilter) -> Count:
        return Count(len(matching_sessions(self._tables, tenant, wanted)), is_exact=True)

    async def stored_bytes(self, tenant: str) -> int:
        return sum(
            SESSION_BYTES + row.stored_bytes
            for key, row in self._tables.sessions.items()
            if key.tenant == tenant
        )

    async def stale_sessions(self, before: Micros, limit: int) -> Sequence[IdleSession]:
        stale = [
            row
            for row in self._tables.sessions.values()
            if not row.lane.is_busy and row.session.updated_at < before
        ]
        stale.sort(key=lambda row: row.session.updated_at)
        return [
            IdleSession(row.lane.key, row.lane.version, row.lane.accept_seq)
            for row in stale[:limit]
        ]

    async def list_messages(
        self,
        key: SessionKey,
        *,
        after: MessagePlace | None = None,
        limit: int,
        max_bytes: int,
        run_id: str | None = None,
    ) -> Page[Message, MessagePlace]:
        row = self._tables.sessions.get(key)
        place = after or (0, 0)
        messages = [] if row is None else row.messages
        own = messages[bisect_right(messages, place, key=place_of) :]
        copied = [] if row is None else [one for one in row.copied if place_of(one) > place]
        whole = chain(copied, (self._tables.full_message(key.tenant, one) for one in own))
        page, more = take_page(
            (message for message in whole if run_id in {None, message.run_id}),
            limit=limit,
            max_bytes=max_bytes,
            size=message_size,
        )
        return messages_page(page, more=more)

    async def log_bytes(self) -> int:
        return self._log.bytes

    async def vitals(self) -> StoreVitals:
        waiting = [
            run.accepted_at for row in self._tables.sessions.values() for run in row.lane.waiting
        ]
        asking = [
            row.request.requested_at
            for row in self._tables.inputs.values()
            if row.request.state is InputState.OPEN
        ]
        return StoreVitals(
            waiting_since=min(waiting, default=None), asking_since=min(asking, default=None)
        )

    async def completes(
        self, tenant: str, wanted: EventFilter, *, after: Position, limit: int, max_bytes: int
    ) -> LogPage:
        return self._log.page(tenant, wanted, after=after, limit=limit, max_bytes=max_bytes)


def _busy(lane: Lane) -> BusySession:
    agents = {run.agent for run in lane.runs}
    agent = agents.pop() if len(agents) == 1 else None
    active = lane.active
    asks = active is not None and active.state is RunState.INPUT_REQUIRED and active.asking.waits
    return BusySession(lane.key, active is not None, len(lane.waiting), agent, asks)


def _page(
    latest_first: Iterable[tuple[int, Item]], after: int | None, limit: int
) -> Page[Item, int]:
    """A page of numbered items."""
    left = (numbered for numbered in latest_first if after is None or numbered[0] < after)
    return numbered_page(
        list(islice(left, limit + 1)),
        limit,
        item=lambda numbered: numbered[1],
        number=lambda numbered: numbered[0],
    )
