"""Subscriptions over the event logs: catch up from the store by pages, then follow a shared tail.

There is no queue per subscriber. A subscription is a position; whoever falls behind the tail reads
from the store again. Nothing is done for a subscriber whom an event does not concern.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Protocol, TypeVar

from runlane_server.core.errors import (
    CursorCompacted,
    CursorInvalid,
    Draining,
    RunNotFound,
    Violation,
)
from runlane_server.core.model import RunComplete, RunEvent, RunKey
from runlane_server.feed.tail import Tail
from runlane_server.feed.topics import topics_of_event, topics_of_filter
from runlane_server.feed.wakeup import Wakeup
from runlane_server.store.base import EventFilter, LoggedComplete, LogPage, Position, Store

PAGE_EVENTS = 256
PAGE_BYTES = 2 << 20


class _Woken(Protocol):
    def wake(self, place: int) -> None: ...


class Feed:
    """Tells subscribers what was committed. It is the listener of a store that is open."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._closed = False
        self.told = store.position
        """The position of the last event that was published here."""
        self._tail: Tail[LoggedComplete] = Tail()
        # Dictionaries as ordered sets: who came first is woken first.
        self._subscribers: defaultdict[Hashable, dict[_Woken, None]] = defaultdict(dict)
        self._shared: tuple[str, Position, LogPage] | None = None
        self._run_tails: dict[RunKey, Tail[RunEvent]] = {}
        # Followed runs that have ended, or may have: the tail lacks what another node wrote.
        self._ended: set[RunKey] = set()
        self._followers: defaultdict[RunKey, dict[RunFollower, None]] = defaultdict(dict)
        store.listener = self

    @property
    def position(self) -> Position:
        """From where on everything is still to come, and kept: where to begin now."""
        return max(self.told, self._store.compacted)

    @property
    def subscriptions(self) -> int:
        """How many subscriptions are open."""
        subscribers = set[_Woken]().union(*self._subscribers.values())
        return len(subscribers) + self.followers

    @property
    def followers(self) -> int:
        """How many of them follow the events of one run."""
        return sum(map(len, self._followers.values()))

    @property
    def furthest_behind(self) -> int:
        """How many events of the log the slowest subscription has not read."""
        subscribers = set[_Woken]().union(*self._subscribers.values())
        positions = [s.position for s in subscribers if isinstance(s, Subscription)]
        return max(0, self.told - min(positions, default=self.told))

    def subscribe(self, tenant: str, wanted: EventFilter, after: Position) -> Subscription:
        """Opens a subscription to terminal events after a position; to be closed by the caller.

        Raises CursorCompacted if events after it were removed, CursorInvalid if it lies ahead of
        the log.
        """
        self._check_open()
        self._check_kept(after)
        if after > max(self.position, self._store.position):
            raise CursorInvalid(
                "cursor: lies ahead of the event log",
                violations=[Violation("cursor", "lies ahead of the event log")],
            )
        return Subscription(self, tenant, wanted, after)

    def follow(self, key: RunKey, after: int) -> RunFollower:
        """Follows the events of a run after an index; to be closed by the caller."""
        self._check_open()
        return RunFollower(self, key, after)

    def close(self) -> None:
        """Ends all subscriptions: whoever waits, or comes to wait, is told Draining."""
        self._closed = True
        for waiting in (self._subscribers, self._followers):
            for subscriber in chain.from_iterable(waiting.values()):
                subscriber.wake(self.told + 1)

    # The store's listener

    def on_completes(self, events: Sequence[LoggedComplete]) -> None:
        """Publishes terminal events; none, where the store went on over some that were removed."""
        first: dict[Hashable, Position] = {}
        begin = events[0].position if events else self._store.position + 1
        if begin > self.told + 1:
            self._notice_hole(self.told)
        self.told = begin - 1
        for event in events:
            self.told = event.position
            self._tail.add(event.position, event, len(event.complete.text))
            for topic in topics_of_event(event):
                first.setdefault(topic, event.position)
            if self._followers:
                self.ended(RunKey(event.tenant, event.complete.run_id))
        self._shared = None
        for topic, position in first.items():
            for subscriber in self._subscribers.get(topic, ()):
                subscriber.wake(position)

    def on_run_events(self, key: RunKey, events: Sequence[RunEvent]) -> None:
        """Publishes events of a run, if anybody follows it and they are news."""
        followers = self._followers.get(key)
        tail = self._run_tails.get(key)
        if tail is not None:
            # What was relayed may come again, where the run has come here since.
            events = [event for event in events if event.index > tail.end]
        if not (followers and events):
            return
        if tail is None or not tail.continues_at(events[0].index):
            # What is in between was written by another node, or without an answer.
            tail = self._run_tails[key] = Tail()
        for event in events:
            tail.add(event.index, event, _size(event))
        for follower in followers:
            follower.wake(events[0].index)

    # What another node does

    def reached(self, key: RunKey) -> int:
        """The index of the last event that a follower of a run was told of."""
        return max((follower.after for follower in self._followers.get(key, ())), default=0)

    def look(self, key: RunKey) -> None:
        """Something may have happened in a run that this node is not told of."""
        self._run_tails.pop(key, None)
        for follower in self._followers.get(key, ()):
            follower.wake(0)

    def ended(self, key: RunKey) -> None:
        """A run has ended, on whichever node; its events may not come here."""
        followers = self._followers.get(key)
        if followers:
            self._ended.add(key)
            for follower in followers:
                follower.wake(0)

    # For itself

    def _notice_hole(self, after: Position) -> None:
        """Events after that position were removed before they came here. Who has not seen them has
        to be told, and any run may have ended, so everybody looks into the store."""
        self._tail = Tail()
        for subscribers in self._subscribers.values():
            for subscriber in subscribers:
                subscriber.wake(after + 1)
        for key in self._followers:
            self.ended(key)

    # For subscriptions

    def _check_open(self) -> None:
        if self._closed:
            raise Draining("the server is shutting down")

    def _check_kept(self, after: Position) -> None:
        if after < self._store.compacted:
            raise CursorCompacted(
                "events after the cursor were removed; GetRun and ListRuns tell what was missed"
            )

    async def _read(self, tenant: str, wanted: EventFilter, after: Position) -> LogPage:
        """What is stored after a position."""
        page = await self._store.completes(
            tenant, wanted, after=after, limit=PAGE_EVENTS, max_bytes=PAGE_BYTES
        )
        # Events may have been removed while it was read; it has a hole then.
        self._check_kept(after)
        return page

    def _at_hand(self, tenant: str, wanted: EventFilter, after: Position) -> LogPage | None:
        """What the tail has after a position; None if that has to be read from the store.

        Who wants everything and keeps up wants the same page as all others who do.
        """
        if not self._tail.covers(after):
            return None
        if not wanted.matches_all:
            return self._page(tenant, after, wanted.matches)
        if self._shared is None or self._shared[:2] != (tenant, after):
            self._shared = (tenant, after, self._page(tenant, after))
        return self._shared[2]

    def _page(
        self, tenant: str, after: Position, matches: Callable[[RunComplete], bool] | None = None
    ) -> LogPage:
        events = self._tail.read(after, PAGE_EVENTS)
        scanned = events[-1].position if events else after
        matching = [event for event in events if event.tenant == tenant]
        if matches is not None:
            matching = [event for event in matching if matches(event.complete)]
        return LogPage(tuple(matching), scanned)

    async def _read_run(self, key: RunKey, after: int) -> Sequence[RunEvent]:
        tail = self._run_tails.get(key)
        if tail is not None and tail.covers(after):
            events = tail.read(after, PAGE_EVENTS)
            if events or key not in self._ended:
                return events
        return await self._store.run_events(
            key, after=after, limit=PAGE_EVENTS, max_bytes=PAGE_BYTES
        )

    async def _check_run(self, key: RunKey) -> None:
        """A run that was deleted with its session has no event to wait for."""
        if await self._store.get_run(key) is None:
            raise RunNotFound.of(key.run_id)

    def _enter(self, topics: Sequence[Hashable], subscriber: _Woken) -> None:
        for topic in topics:
            self._subscribers[topic][subscriber] = None

    def _leave(self, topics: Sequence[Hashable], subscriber: _Woken) -> None:
        for topic in topics:
            _discard(self._subscribers, topic, subscriber)

    def _enter_run(self, key: RunKey, follower: RunFollower) -> None:
        self._followers[key][follower] = None

    def _leave_run(self, key: RunKey, follower: RunFollower) -> None:
        _discard(self._followers, key, follower)
        if key not in self._followers:
            self._run_tails.pop(key, None)
            self._ended.discard(key)


class Subscription:
    """A place in the log of terminal events, and what is wanted from there on."""

    def __init__(self, feed: Feed, tenant: str, wanted: EventFilter, after: Position) -> None:
        self._feed = feed
        self._tenant = tenant
        self._wanted = wanted
        # Set while everything up to the feed's position was looked at: until it is woken, no event
        # concerns this subscription, and it was told what the feed was.
        self._parked = False
        self._after = after
        self._topics = topics_of_filter(tenant, wanted)
        self._wakeup = Wakeup()
        feed._enter(self._topics, self)  # noqa: SLF001 - the two halves of one mechanism

    @property
    def position(self) -> Position:
        """All that is wanted up to here was returned."""
        return max(self._after, self._feed.told) if self._parked else self._after

    async def next(self, timeout: float) -> LogPage:
        """The next events, or none of them after `timeout` seconds; `scanned` is how far it is.

        Raises Draining when the feed was closed.
        """
        until = self._wakeup.after(timeout)
        while True:
            page = await self._look(until)
            if page.events or self._wakeup.past(until):
                return page

    def close(self) -> None:
        """Leaves the feed."""
        self._feed._leave(self._topics, self)  # noqa: SLF001
        self._wakeup.close()

    def wake(self, place: int) -> None:
        """An event at `place` concerns this subscription, or the feed was closed."""
        if not self._parked:
            # It looks at what the feed was told before it waits.
            return
        self._after = max(self._after, place - 1)
        self._parked = False
        self._wakeup.wake()

    def _knows_all(self) -> bool:
        return self._parked or self._after >= self._feed.told

    async def _look(self, until: float) -> LogPage:
        """Reads one page; parks and waits where there is none."""
        if self._knows_all():
            # Only who has been told everything is told that there is no more.
            self._feed._check_open()  # noqa: SLF001
            self._parked = True
            await self._wakeup.wait(until)
            if self._knows_all():
                return LogPage((), self.position)
        page = self._feed._at_hand(self._tenant, self._wanted, self._after)  # noqa: SLF001
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
    """A place in the log of one run."""

    def __init__(self, feed: Feed, key: RunKey, after: int) -> None:
        self._feed = feed
        self._key = key
        self.after = after
        """The index of the last event that was returned, or was known before."""
        self._wakeup = asyncio.Event()
        feed._enter_run(key, self)  # noqa: SLF001 - the two halves of one mechanism

    async def next(self) -> Sequence[RunEvent]:
        """The next events, one at least.

        Raises Draining when the feed was closed, RunNotFound when the run was deleted, and
        CursorCompacted.
        """
        while True:
            self._wakeup.clear()
            events = await self._feed._read_run(self._key, self.after)  # noqa: SLF001
            if events:
                self.after = events[-1].index
                return events
            self._feed._check_open()  # noqa: SLF001
            await self._feed._check_run(self._key)  # noqa: SLF001
            await self._wakeup.wait()

    def close(self) -> None:
        """Leaves the feed."""
        self._feed._leave_run(self._key, self)  # noqa: SLF001

    def wake(self, place: int) -> None:
        """There are new events, or the feed was closed."""
        self._wakeup.set()


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


def _size(event: RunEvent) -> int:
    body = event.body
    return len(getattr(body, "text", "") or getattr(body, "content", ""))
