"""Streams of sessions: a snapshot, and everything that happens after exactly its position (R50).

A stream is a position in each of its sessions, not a queue. The log of the lane has the order of
the events of all runs (store/lane_log.py). The output of the active run comes between two of them:
it is read from the events of the run, as `SubscribeRun` does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from runlane_server.core.errors import CursorCompacted
from runlane_server.core.input import InputRequest, InputState
from runlane_server.core.model import (
    ReasoningDelta,
    Run,
    RunComplete,
    RunEvent,
    RunKey,
    Session,
    SessionKey,
    Started,
    TextDelta,
)
from runlane_server.core.transition import Lane, LaneRun
from runlane_server.feed.event_size import event_size
from runlane_server.feed.session_topics import PAGE_ENTRIES, SessionView
from runlane_server.feed.tail import PAGE_BYTES
from runlane_server.feed.wakeup import Wakeup
from runlane_server.store.lane_log import LaneEntry, LanePlace, end_of, is_output

if TYPE_CHECKING:
    from runlane_server.feed.feed import Feed, RunFollower

PART_RUNS = 50
"""Waiting runs in a part of a snapshot, and in a page of changed ones."""

Relayed: TypeAlias = Callable[[RunKey], AbstractContextManager[None]]
"""Brings in the events of a run that another node executes."""


class SessionPlace(NamedTuple):
    """A position in a session, from which a stream resumes.

    `created_at` distinguishes the session from later ones with its id; 0 if there was none. `place`
    is that in the log of its lane; `run_id` is the run whose output may come next, and
    `event_index` the last of its events before the position.
    """

    created_at: int = 0
    place: LanePlace = 0
    run_id: str = ""
    event_index: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A part of a snapshot: the session, the active run with its output so far, the runs that
    joined its turn, the waiting runs in the order in which they start, and the open input requests.
    `continues`: not the last part."""

    session: Session | None = None
    active_run: Run | None = None
    output: tuple[RunEvent, ...] = ()
    queue: tuple[Run, ...] = ()
    inputs: tuple[InputRequest, ...] = ()
    folded: tuple[Run, ...] = ()
    continues: bool = True


@dataclass(frozen=True, slots=True)
class SessionChanged:
    """The session and its active run as they are now; no session: it was deleted."""

    session: Session | None
    active_run: Run | None


@dataclass(frozen=True, slots=True)
class QueueChanged:
    """The waiting runs in the order in which they start, and those of them that are new or
    changed."""

    run_ids: tuple[str, ...]
    runs: tuple[Run, ...]


class Step(NamedTuple):
    """The next step of a stream, and the position after it."""

    item: Snapshot | RunEvent | SessionChanged | QueueChanged
    at: SessionPlace


class SessionFollower:
    """A position in one session. Without a start it begins with a snapshot."""

    def __init__(
        self,
        feed: Feed,
        key: SessionKey,
        start: SessionPlace | None,
        *,
        with_deltas: bool,
        on_wake: Callable[[], None],
        relayed: Relayed,
    ) -> None:
        self.key = key
        self.at = start or SessionPlace()
        self._feed = feed
        self._with_deltas = with_deltas
        self._on_wake = on_wake
        self._relayed = relayed
        self._parts = self._snapshot() if start is None else None
        self._entries: deque[LaneEntry] = deque()
        self._is_removed = False
        # Whether the lane may have changed since its last view, and have events after `at`.
        self._has_changed = self._has_events = True
        # Whether only the store can tell if the session is still the one of `at`.
        self._is_doubtful = True
        self._view: SessionView | None = None
        self._known: tuple[Session | None, object] | None = None
        self._queue: tuple[LaneRun, ...] | None = None
        self._live: tuple[str, RunFollower] | None = None
        self._following = ExitStack()
        feed.sessions.add(key, self)

    @property
    def place(self) -> LanePlace:
        """The place up to which it has read, without the events that it holds."""
        return self._entries[-1].place if self._entries else self.at.place

    def wake(self) -> None:
        """Reports a change of the lane."""
        self._has_changed = self._has_events = True
        self._on_wake()

    def doubt(self) -> None:
        """Reports that the session may be another one now."""
        self._is_doubtful = True

    def end(self, left: Sequence[LaneEntry]) -> None:
        """Reports that the session was removed."""
        self._entries.extend(left)
        self._is_removed = True
        self._view = None
        self.wake()

    def close(self) -> None:
        """Stops following."""
        self._feed.sessions.remove(self.key, self)
        self._following.close()

    async def read(self) -> Sequence[Step]:
        """The next steps, about a page; none if there are none yet.

        Raises CursorCompacted.
        """
        if self._parts is not None:
            part = await anext(self._parts, None)
            if part is not None:
                return (part,)
            self._parts = None
        return (
            await self._read_events()
            or await self._read_changes()
            or [*await self._read_output(None, live=True)]
        )

    # --- The snapshot -------------------------------------------------------------------------

    async def _snapshot(self) -> AsyncIterator[Step]:
        # Before the read: the lane may change during it.
        self._has_changed = self._has_events = self._is_doubtful = False
        view = await self._feed.sessions.view(self.key, self)
        session, lane = _at_version(view.session, lane=view.lane), view.lane
        active = lane.active
        self.at = SessionPlace(
            0 if session is None else session.created_at,
            end_of(lane.version) if lane.exists else 0,
            "" if active is None else active.run_id,
            0 if active is None else active.events,
        )
        self._known, self._queue = (session, _state(active)), lane.waiting
        run = None if active is None else await self._run(active)
        yield self._part(Snapshot(session, run))
        async for runs in self._runs(lane.waiting):
            yield self._part(Snapshot(queue=runs))
        async for runs in self._runs(lane.folded):
            yield self._part(Snapshot(folded=runs))
        if active is not None:
            for inputs in _pages(await self._inputs(active)):
                yield self._part(Snapshot(inputs=inputs))
            async for output in self._output_so_far(active):
                yield self._part(Snapshot(output=output))
        yield self._part(Snapshot(continues=False))

    def _part(self, snapshot: Snapshot) -> Step:
        return Step(snapshot, self.at)

    async def _output_so_far(self, active: LaneRun) -> AsyncIterator[tuple[RunEvent, ...]]:
        """The events of the current attempt."""
        after, has_begun = 0, False
        while after < active.events:
            events = await self._feed.store.run_events(
                RunKey(self.key.tenant, active.run_id),
                after=after,
                limit=PAGE_ENTRIES,
                max_bytes=PAGE_BYTES,
            )
            if not events:
                return  # its session was deleted in the meantime
            after = events[-1].index
            kept = []
            for event in events:
                body = event.body
                has_begun |= isinstance(body, Started) and body.attempt == active.attempt
                if has_begun and event.index <= active.events and self._is_wanted(event):
                    kept.append(event)
            if kept:
                yield tuple(kept)

    async def _inputs(self, active: LaneRun) -> Sequence[InputRequest]:
        """The open input requests at the version of the lane."""
        found = [
            await self._feed.store.get_input(self.key.tenant, pending.input_request_id)
            for pending in active.asking.pending
        ]
        return [
            request._replace(state=InputState.OPEN, closed_at=None, answer=None)
            for request in found
            if request is not None
        ]

    async def _runs(self, wanted: Sequence[LaneRun]) -> AsyncIterator[tuple[Run, ...]]:
        for first in range(0, len(wanted), PART_RUNS):
            runs = [await self._run(run) for run in wanted[first : first + PART_RUNS]]
            yield tuple(run for run in runs if run is not None)

    async def _run(self, wanted: LaneRun) -> Run | None:
        """A run as its lane has it, which may be newer in the store."""
        run = await self._feed.store.get_run(RunKey(self.key.tenant, wanted.run_id))
        if run is None:
            return None
        return run._replace(
            state=wanted.state,
            attempt=wanted.attempt,
            started_at=wanted.started_at,
            ended_at=None,
            folded_into=wanted.folded_into,
            complete=None,
        )

    # --- Events -------------------------------------------------------------------------------

    async def _read_events(self) -> list[Step]:
        if not self._entries:
            ended = await self._fill()
            if ended:
                return [self._end()]
        steps: list[Step] = []
        room = PAGE_BYTES
        while self._entries and len(steps) < PAGE_ENTRIES and room > 0:
            entry = self._entries[0]
            if self._view is not None and entry.place > end_of(self._view.lane.version):
                break
            output = await self._output_before(entry)
            if not output:
                self._entries.popleft()
                output = (self._deliver(entry),)
            steps += output
            room -= sum(map(_size, output))
        return steps

    async def _fill(self) -> bool:
        """Reads the next page of the log; returns whether the session is another one now."""
        if self._is_removed:
            return True
        if not self._has_events:
            return False
        # Before the read: events may come during it.
        self._has_events = False
        version = 0 if self._view is None else self._view.lane.version
        known = self._feed.sessions.read(self.key, self.at.place, version)
        if known is not None and not self._is_doubtful:
            self._take(known)
            return False
        self._is_doubtful = False
        page = await self._feed.store.lane_events(
            self.key, after=self.at.place, limit=PAGE_ENTRIES, max_bytes=PAGE_BYTES
        )
        if self._has_been_removed:
            return False
        created_at = page.created_at or 0
        if self.at.created_at not in {0, created_at}:
            return True
        if self.at.place < page.start:
            raise CursorCompacted(
                "events of the session after the cursor were removed; subscribe without a cursor"
            )
        self.at = self.at._replace(created_at=created_at)
        self._take(page.entries)
        return False

    @property
    def _has_been_removed(self) -> bool:
        """Whether `end` was called, perhaps during a read."""
        return self._is_removed

    def _take(self, entries: Sequence[LaneEntry]) -> None:
        self._entries.extend(entries)
        self._has_events |= bool(entries)

    def _deliver(self, entry: LaneEntry) -> Step:
        event = entry.event
        self.at = self.at._replace(place=entry.place)
        if isinstance(event.body, Started) or event.run_id == self.at.run_id:
            self.at = self.at._replace(run_id=event.run_id, event_index=event.index)
        if isinstance(event.body, RunComplete) and event.run_id == self.at.run_id:
            self.at = self.at._replace(run_id="", event_index=0)
            self._unfollow()
        return Step(event, self.at)

    async def _output_before(self, entry: LaneEntry) -> Sequence[Step]:
        """The output that comes before an event: of its run, and of the run that was active before
        it started."""
        event = entry.event
        if event.run_id == self.at.run_id:
            is_next = event.index == self.at.event_index + 1
            return () if is_next else await self._read_output(event.index - 1)
        return await self._read_output(None) if isinstance(event.body, Started) else ()

    async def _read_output(self, upto: int | None, *, live: bool = False) -> Sequence[Step]:
        """The next output of the active run, up to an index or its next event of another kind."""
        run_id = self.at.run_id
        if run_id and live:
            self._follow(run_id)
        key = RunKey(self.key.tenant, run_id)
        steps: list[Step] = []
        is_more = bool(run_id)
        while is_more and not steps:
            before = self.at.event_index
            for event in await self._next_of_run(key, live=live):
                if not is_output(event.body) or (upto is not None and event.index > upto):
                    break
                self.at = self.at._replace(event_index=event.index)
                if self._is_wanted(event):
                    steps.append(Step(event, self.at))
            # Output that is not wanted may fill whole pages.
            is_more = self.at.event_index > before
        if self._live is not None:
            self._live[1].after = max(self._live[1].after, self.at.event_index)
        return steps

    async def _next_of_run(self, key: RunKey, *, live: bool) -> Sequence[RunEvent]:
        after = self.at.event_index
        events = await self._feed.read_run(key, after)
        if events or live:
            return events
        # Events that a later one is known to follow are stored; a relay may bring them later.
        return await self._feed.store.run_events(
            key, after=after, limit=PAGE_ENTRIES, max_bytes=PAGE_BYTES
        )

    def _follow(self, run_id: str) -> None:
        """Follows the output of a run as it is written, on any node."""
        if self._live is not None and self._live[0] == run_id:
            return
        self._unfollow()
        key = RunKey(self.key.tenant, run_id)
        follower = self._feed.follow(key, self.at.event_index, self._on_wake)
        self._following.enter_context(closing(follower))
        self._following.enter_context(self._relayed(key))
        self._live = run_id, follower

    def _unfollow(self) -> None:
        self._following.close()
        self._live = None

    def _is_wanted(self, event: RunEvent) -> bool:
        return self._with_deltas or not isinstance(event.body, TextDelta | ReasoningDelta)

    # --- The session and its queue ------------------------------------------------------------

    async def _read_changes(self) -> list[Step]:
        if self._view is None:
            if not self._has_changed:
                return []
            # Before the read: the lane may change during it.
            self._has_changed = False
            view = await self._feed.sessions.view(self.key, self)
            if self._has_been_removed:
                return []  # it is due again
            if view.session is None:
                return [self._end()] if self.at.created_at else []
            if self.at.created_at not in {0, view.session.created_at}:
                return [self._end()]
            # What was committed before it comes first.
            self._view, self._has_events = view, True
            events = await self._read_events()
            if events:
                return events
        view, self._view = self._view, None
        changes = [
            *await self._session_change(view.session, view.lane),
            *await self._queue_change(view.lane),
        ]
        if self._entries:
            # The view is older than they are, and another node's commit wakes nobody here.
            self._has_changed = True
        return changes or await self._read_events()

    async def _session_change(self, session: Session | None, lane: Lane) -> Sequence[Step]:
        now = _at_version(session, lane=lane)
        known, self._known = self._known, (now, _state(lane.active))
        if known == self._known:
            return ()
        run = None if lane.active is None else await self._run(lane.active)
        return (Step(SessionChanged(now, run), self.at),)

    async def _queue_change(self, lane: Lane) -> Sequence[Step]:
        known, self._queue = self._queue, lane.waiting
        if known == lane.waiting:
            return ()
        old = set(known or ())
        changed = [run for run in lane.waiting if run not in old]
        run_ids = tuple(run.run_id for run in lane.waiting)
        steps = [Step(QueueChanged(run_ids, runs), self.at) async for runs in self._runs(changed)]
        return steps or (Step(QueueChanged(run_ids, ()), self.at),)

    def _end(self) -> Step:
        """The session was deleted. Another one with its id begins with a position of its own."""
        self._is_removed = False
        self._entries.clear()
        self._view = self._known = self._queue = None
        self._unfollow()
        self._has_changed = self._has_events = True
        self.at = SessionPlace()
        return Step(SessionChanged(None, None), self.at)


class SessionStream:
    """The sessions of one stream, of one tenant. They take turns."""

    def __init__(
        self,
        feed: Feed,
        tenant: str,
        starts: Mapping[str, SessionPlace | None],
        *,
        with_deltas: bool,
        relayed: Relayed,
    ) -> None:
        self._feed = feed
        self._tenant = tenant
        self._starts = starts
        self._with_deltas = with_deltas
        self._relayed = relayed
        self._wakeup = Wakeup()
        self._due: dict[str, None] = dict.fromkeys(starts)
        # Made one by one as they are read: a thousand at once would hold up the other calls.
        self._followers: dict[str, SessionFollower] = {}
        self._new = set(starts)
        """The sessions that it has not caught up with."""

    def _follower(self, session_id: str) -> SessionFollower:
        follower = self._followers.get(session_id)
        if follower is None:
            follower = self._followers[session_id] = SessionFollower(
                self._feed,
                SessionKey(self._tenant, session_id),
                self._starts[session_id],
                with_deltas=self._with_deltas,
                on_wake=self._waker(session_id),
                relayed=self._relayed,
            )
        return follower

    def _waker(self, session_id: str) -> Callable[[], None]:
        def wake() -> None:
            self._due[session_id] = None
            self._wakeup.wake()

        return wake

    async def next(self, timeout: float) -> tuple[str, Sequence[Step]] | None:
        """The next steps of one session, or None after `timeout` seconds without any.

        Raises Draining once the feed is closed, and CursorCompacted with the session.
        """
        until = self._wakeup.after(timeout)
        while True:
            while self._due:
                session_id = next(iter(self._due))
                del self._due[session_id]
                steps = await self._read(session_id)
                if steps:
                    self._due[session_id] = None
                    return session_id, steps
                self._new.discard(session_id)
            self._feed.check_open()
            if self._wakeup.past(until):
                return None
            await self._wakeup.wait(until)

    async def _read(self, session_id: str) -> Sequence[Step]:
        try:
            if session_id not in self._new:
                return await self._follower(session_id).read()
            async with self._feed.sessions.catching_up(self._tenant):
                return await self._follower(session_id).read()
        except CursorCompacted as error:
            raise CursorCompacted(
                error.message, metadata={**error.metadata, "session_id": session_id}
            ) from error

    def close(self) -> None:
        """Stops following."""
        for follower in self._followers.values():
            follower.close()
        self._wakeup.close()


def _size(step: Step) -> int:
    return event_size(step.item.body) if isinstance(step.item, RunEvent) else 0


def _at_version(session: Session | None, *, lane: Lane) -> Session | None:
    """The session as of the version of a lane."""
    if session is None:
        return None
    return replace(
        session,
        active_run_id="" if lane.active is None else lane.active.run_id,
        waiting_runs=len(lane.waiting),
    )


def _state(active: LaneRun | None) -> object:
    """The fields whose change is reported for the active run: its output is not among them."""
    return None if active is None else (active.run_id, active.state, active.attempt)


def _pages(requests: Sequence[InputRequest]) -> Iterator[tuple[InputRequest, ...]]:
    """One request may have a large schema."""
    for request in requests:
        yield (request,)
