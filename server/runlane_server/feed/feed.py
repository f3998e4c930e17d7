"""Subscriptions to the event logs: catch up from the store page by page, then follow a shared tail.

A subscription is a position, not a queue. A subscriber behind the tail reads from the store again.
An event wakes only the subscribers whose topics it matches.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from operator import attrgetter
from typing import Protocol, TypeVar

from runlane_server.core.errors import (
    CursorCompacted,
    CursorInvalid,
    Draining,
    RunNotFound,
)
from runlane_server.core.model import RunComplete, RunEvent, RunKey
from runlane_server.feed.event_size import event_size
from runlane_server.feed.session_topics import SessionTopics
from runlane_server.feed.tail import PAGE_BYTES, TailPool
from runlane_server.feed.topics import topics_of_event, topics_of_filter
from runlane_server.feed.wakeup import Wakeup
from runlane_server.store.base import EventFilter, LoggedComplete, LogPage, Position, Store
from runlane_server.store.lane_log import LaneChange

A_DAY = 86_400.0

PAGE_EVENTS = 256

LOG_TAIL_BYTES = 32 << 20
"""Budget of the terminal events in memory, of all tenants. An event counts as its texts and 4 KiB,
so that at most 8,192 are kept."""

RUN_TAIL_BYTES = 64 << 20
"""Budget of the events of followed runs in memory, of all tenants. An event counts as its texts and
512 bytes."""


class _Subscriber(Protocol):
    def wake(self, place: int) -> None: ...


class Feed:
    """Publishes committed events to subscribers. It is the listener of an open store."""

    def __init__(self, store: Store) -> None:
        self.store = self._store = store
        self.sessions = SessionTopics(store)
        """The followed sessions."""
        self._closed = False
        self.head = store.position
        """The position of the last event published here."""
        # By tenant, each with all its events after `_tail_start`, or after its own eviction.
        self._tails: TailPool[str, LoggedComplete] = TailPool(
            str, budget=LOG_TAIL_BYTES, entry_weight=4096
        )
        self._tail_start: Position | None = None
        # Dictionaries as ordered sets: subscribers are woken in the order in which they came.
        self._subscribers: defaultdict[Hashable, dict[_Subscriber, None]] = defaultdict(dict)
        self._shared: tuple[str, Position, LogPage] | None = None
        self._run_tails: TailPool[RunKey, RunEvent] = TailPool(
            attrgetter("tenant"), budget=RUN_TAIL_BYTES, entry_weight=512
        )
        # Followed runs that have ended or may have: their tail lacks the events of other nodes.
        self._ended: set[RunKey] = set()
        self._followers: defaultdict[RunKey, dict[RunFollower, None]] = defaultdict(dict)
        store.listener = self

    @property
    def position(self) -> Position:
        """The position at which a subscription from now on starts."""
        return max(self.head, self._store.compacted)

    @property
    def subscriptions(self) -> int:
        """The number of open subscriptions, followers of runs included."""
        subscribers = set[_Subscriber]().union(*self._subscribers.values())
        return len(subscribers) + self.followers + self.sessions.followers

    @property
    def followers(self) -> int:
        """The number of open followers of runs."""
        return sum(map(len, self._followers.values()))

    @property
    def furthest_behind(self) -> int:
        """The number of events that the slowest subscription has not read."""
        subscribers = set[_Subscriber]().union(*self._subscribers.values())
        positions = [s.position for s in subscribers if isinstance(s, Subscription)]
        return max(0, self.head - min(positions, default=self.head))

    def subscribe(self, tenant: str, wanted: EventFilter, after: Position) -> Subscription:
        """Opens a subscription to terminal events after a position. The caller must close it.

        Raises CursorCompacted if events after the position were removed, and CursorInvalid if it
        lies ahead of the log.
        """
        self.check_open()
        self._check_kept(tenant, after)
        if after > max(self.position, self._store.position):
            raise CursorInvalid.of("cursor", "lies ahead of the event log")
        return Subscription(self, tenant, wanted, after)

    def follow(
        self, key: RunKey, after: int, on_wake: Callable[[], None] | None = None
    ) -> RunFollower:
        """Follows the events of a run after an index. The caller must close the follower.

        `on_wake` is called when it may have more events.
        """
        self.check_open()
        return RunFollower(self, key, after, on_wake)

    def close(self) -> None:
        """Ends all subscriptions: pending and later waits raise Draining."""
        self._closed = True
        for waiting in (self._subscribers, self._followers):
            for subscriber in chain.from_iterable(waiting.values()):
                subscriber.wake(self.head + 1)
        self.sessions.wake_all()

    # The listener of the store

    def on_completes(self, events: Sequence[LoggedComplete]) -> None:
        """Publishes terminal events. The list is empty if the store skipped compacted events."""
        first: dict[Hashable, Position] = {}
        begin = events[0].position if events else self._store.position + 1
        if begin > self.head + 1:
            self._handle_gap(self.head)
        self.head = begin - 1
        if self._tail_start is None:
            self._tail_start = self.head
        for event in events:
            self.head = event.position
            size = event_size(event.complete)
            self._tails.add(event.tenant, event.position, event, size, self._tail_start)
            for topic in topics_of_event(event):
                first.setdefault(topic, event.position)
            if self._followers:
                self.mark_ended(RunKey(event.tenant, event.complete.run_id))
        self._shared = None
        for topic, position in first.items():
            for subscriber in self._subscribers.get(topic, ()):
                subscriber.wake(position)

    def on_run_events(self, key: RunKey, events: Sequence[RunEvent]) -> None:
        """Publishes events of a run that are new to its followers, if it has any."""
        followers = self._followers.get(key)
        tail = self._run_tails.get(key)
        if tail is not None:
            # Relayed events may come again, if the run has moved to this node since.
            events = [event for event in events if event.index > tail.end]
        if not (followers and events):
            return
        if tail is not None and not tail.continues_at(events[0].index):
            # Another node wrote the events in between, or their commit got no answer.
            self._run_tails.drop(key)
        for event in events:
            self._run_tails.add(key, event.index, event, event_size(event.body))
        for follower in followers:
            follower.wake(events[0].index)

    def on_lane(self, change: LaneChange) -> None:
        """Publishes a change of a lane to the followers of its session, if it has any."""
        self.sessions.on_change(change)

    # Events of other nodes

    def last_index(self, key: RunKey) -> int:
        """The highest index of an event that a follower of the run has read; 0 if none."""
        return max((follower.after for follower in self._followers.get(key, ())), default=0)

    def invalidate(self, key: RunKey) -> None:
        """Drops the tail of a run, so that its followers read from the store."""
        self._run_tails.drop(key)
        for follower in self._followers.get(key, ()):
            follower.wake(0)

    def mark_ended(self, key: RunKey) -> None:
        """Notes the end of a run on any node; its last events may not be in the tail."""
        followers = self._followers.get(key)
        if followers:
            self._ended.add(key)
            for follower in followers:
                follower.wake(0)

    def _handle_gap(self, after: Position) -> None:
        """Handles events that were compacted before they were published here.

        Subscribers behind them must get CursorCompacted, and any run may have ended, so everybody
        reads from the store.
        """
        self._tails.clear()
        self._tail_start = None
        for subscribers in self._subscribers.values():
            for subscriber in subscribers:
                subscriber.wake(after + 1)
        for key in self._followers:
            self.mark_ended(key)

    # Used by subscriptions and followers

    def check_open(self) -> None:
        """Raises Draining once the feed is closed."""
        if self._closed:
            raise Draining("the server is shutting down")

    def _check_kept(self, tenant: str, after: Position) -> None:
        if after < self._store.compacted_of(tenant):
            raise CursorCompacted(
                "events after the cursor were removed; use GetRun and ListRuns to catch up"
            )

    async def _read(self, tenant: str, wanted: EventFilter, after: Position) -> LogPage:
        """Reads a page from the store."""
        page = await self._store.completes(
            tenant, wanted, after=after, limit=PAGE_EVENTS, max_bytes=PAGE_BYTES
        )
        # A compaction during the read may have left a gap in the page.
        self._check_kept(tenant, after)
        return page

    def _read_tail(self, tenant: str, wanted: EventFilter, after: Position) -> LogPage | None:
        """Reads a page from the tail; None if the position is before the tail.

        All subscribers that keep up without a filter share one page.
        """
        if not self._is_in_tail(tenant, after):
            return None
        if not wanted.matches_all:
            return self._page(tenant, after, wanted.matches)
        if self._shared is None or self._shared[:2] != (tenant, after):
            self._shared = (tenant, after, self._page(tenant, after))
        return self._shared[2]

    def _page(
        self, tenant: str, after: Position, matches: Callable[[RunComplete], bool] | None = None
    ) -> LogPage:
        tail = self._tails.get(tenant)
        events = () if tail is None else tail.read(after, PAGE_EVENTS, PAGE_BYTES)
        goes_on = tail is not None and events and events[-1].position < tail.end
        scanned = events[-1].position if goes_on else max(after, self.head)
        if matches is not None:
            events = [event for event in events if matches(event.complete)]
        return LogPage(tuple(events), scanned)

    def _is_in_tail(self, tenant: str, after: Position) -> bool:
        tail = self._tails.get(tenant)
        if tail is not None:
            return tail.covers(after)
        return self._tail_start is not None and after >= self._tail_start

    async def read_run(self, key: RunKey, after: int) -> Sequence[RunEvent]:
        """The next events of a run after an index, from memory if they are there."""
        tail = self._run_tails.get(key)
        if tail is not None and tail.covers(after):
            events = tail.read(after, PAGE_EVENTS, PAGE_BYTES)
            if events or key not in self._ended:
                return events
        return await self._store.run_events(
            key, after=after, limit=PAGE_EVENTS, max_bytes=PAGE_BYTES
        )

    async def _end_of_deleted(self, key: RunKey) -> Sequence[RunEvent]:
        """The end of a run whose session was deleted, with its number: the events before it are
        gone. Empty if the run was not deleted. Raises RunNotFound."""
        if await self._store.get_run(key) is not None:
            return ()
        deleted = await self._store.get_deleted_run(key)
        wanted = EventFilter(run_ids=frozenset({key.run_id}))
        page = await self._store.completes(
            key.tenant,
            wanted,
            after=self._store.compacted_of(key.tenant),
            limit=PAGE_EVENTS,
            max_bytes=PAGE_BYTES,
        )
        if deleted is None or not page.events:
            raise RunNotFound.of(key.run_id)
        complete = page.events[-1].complete
        return (RunEvent(key.run_id, deleted.events, complete.ended_at, complete),)

    def _add_subscriber(self, topics: Sequence[Hashable], subscriber: _Subscriber) -> None:
        for topic in topics:
            self._subscribers[topic][subscriber] = None

    def _remove_subscriber(self, topics: Sequence[Hashable], subscriber: _Subscriber) -> None:
        for topic in topics:
            _discard(self._subscribers, topic, subscriber)

    def _add_follower(self, key: RunKey, follower: RunFollower) -> None:
        self._followers[key][follower] = None

    def _remove_follower(self, key: RunKey, follower: RunFollower) -> None:
        _discard(self._followers, key, follower)
        if key not in self._followers:
            self._run_tails.drop(key)
            self._ended.discard(key)


class Subscription:
    """A position in the log of terminal events, with a filter for the events after it."""

    def __init__(self, feed: Feed, tenant: str, wanted: EventFilter, after: Position) -> None:
        self._feed = feed
        self._tenant = tenant
        self._wanted = wanted
        # Set while the subscription has read up to the head of the feed: until it is woken, no
        # event matches it, and its position moves with the head.
        self._parked = False
        self._after = after
        self._topics = topics_of_filter(tenant, wanted)
        self._wakeup = Wakeup()
        feed._add_subscriber(self._topics, self)  # noqa: SLF001 - the two halves of one mechanism

    @property
    def position(self) -> Position:
        """The position up to which all matching events were returned."""
        return max(self._after, self._feed.head) if self._parked else self._after

    async def next(self, timeout: float) -> LogPage:
        """Returns the next events, or none after `timeout` seconds; `scanned` is the new position.

        Raises Draining once the feed is closed.
        """
        until = self._wakeup.after(timeout)
        while True:
            page = await self._advance(until)
            if page.events or self._wakeup.past(until):
                return page

    def close(self) -> None:
        """Removes this from the feed."""
        self._feed._remove_subscriber(self._topics, self)  # noqa: SLF001
        self._wakeup.close()

    def wake(self, place: int) -> None:
        """Reports a matching event at `place`, or the end of the feed."""
        if not self._parked:
            # It compares its position with the head before it waits.
            return
        self._after = max(self._after, place - 1)
        self._parked = False
        self._wakeup.wake()

    def _is_caught_up(self) -> bool:
        return self._parked or self._after >= self._feed.head

    async def _advance(self, until: float) -> LogPage:
        """Reads one page; parks and waits where there is none."""
        if self._is_caught_up():
            # Only a subscription that has read everything gets Draining.
            self._feed.check_open()
            self._parked = True
            await self._wakeup.wait(until)
            if self._is_caught_up():
                return LogPage((), self.position)
        page = self._feed._read_tail(self._tenant, self._wanted, self._after)  # noqa: SLF001
        if page is None:
            page = await self._read_stored(until)
        self._after = max(self._after, page.scanned)
        return page

    async def _read_stored(self, until: float) -> LogPage:
        try:
            async with asyncio.timeout_at(until):
                return await self._feed._read(  # noqa: SLF001
                    self._tenant, self._wanted, self._after
                )
        except TimeoutError:
            return LogPage((), self._after)


class RunFollower:
    """A position in the events of one run."""

    def __init__(
        self, feed: Feed, key: RunKey, after: int, on_wake: Callable[[], None] | None = None
    ) -> None:
        self._feed = feed
        self._key = key
        self._on_wake = on_wake
        self.after = after
        """The index of the last event returned, initially that of the last event known."""
        self._wakeup = Wakeup()
        self._is_due = False
        # A run without new events may have been deleted. Only `wake(0)` makes that possible again:
        # a read of the store after each event would cost more than the event.
        self._may_be_deleted = True
        feed._add_follower(key, self)  # noqa: SLF001 - the two halves of one mechanism

    async def next(self, timeout: float = A_DAY) -> Sequence[RunEvent]:
        """Returns the next events, or none after `timeout` seconds.

        Raises Draining once the feed is closed, RunNotFound once the run is deleted, and
        CursorCompacted.
        """
        until = self._wakeup.after(timeout)
        while True:
            # Before the read: a wake-up during it must not be lost.
            self._is_due = False
            events = await self._feed.read_run(self._key, self.after)
            if not events:
                self._feed.check_open()
                events = await self._end_of_deleted()
            if events:
                self.after = events[-1].index
                return events
            if self._wakeup.past(until):
                return ()
            if not self._is_due:
                await self._wakeup.wait(until)

    @property
    def has_company(self) -> bool:
        """Whether the run has other followers."""
        return len(self._feed._followers[self._key]) > 1  # noqa: SLF001

    async def _end_of_deleted(self) -> Sequence[RunEvent]:
        if not self._may_be_deleted:
            return ()
        # Before the read: the run may end during it.
        self._may_be_deleted = False
        return await self._feed._end_of_deleted(self._key)  # noqa: SLF001

    def close(self) -> None:
        """Removes this from the feed."""
        self._feed._remove_follower(self._key, self)  # noqa: SLF001
        self._wakeup.close()

    def wake(self, place: int) -> None:
        """Reports new events from the index `place` on, or the end of the feed; 0 if the run may
        have ended, or the store must be read again."""
        if place == 0:
            self._may_be_deleted = True
        self._is_due = True
        self._wakeup.wake()
        if self._on_wake is not None:
            self._on_wake()


Topic = TypeVar("Topic", bound=Hashable)
Member = TypeVar("Member")


def _discard(
    subscribers: defaultdict[Topic, dict[Member, None]], topic: Topic, subscriber: Member
) -> None:
    held = subscribers.get(topic)
    if held is None:
        return
    held.pop(subscriber, None)
    if not held:
        del subscribers[topic]
