"""The followed sessions of a node: the latest events of each, and who follows it."""

from __future__ import annotations

import asyncio
from asyncio import Semaphore
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakValueDictionary

from runlane_server.core.model import Session, SessionKey
from runlane_server.core.transition import Lane
from runlane_server.feed.event_size import event_size
from runlane_server.feed.tail import PAGE_BYTES, TailPool
from runlane_server.store.base import Store
from runlane_server.store.lane_log import LaneChange, LaneEntry, LanePlace, end_of

LANE_TAIL_BYTES = 16 << 20
"""Budget of the events of followed sessions in memory, of all tenants."""

PAGE_ENTRIES = 256

MAX_CATCHING_UP = 4
"""Reads at the same time with which streams of a tenant catch up. A stream may have a thousand
sessions, and a tenant many streams."""


class Follower(Protocol):
    """A subscriber to a session."""

    def wake(self) -> None:
        """Reports a change of the lane."""

    def end(self, left: Sequence[LaneEntry]) -> None:
        """Reports that the session was removed; `left` are its last events, as far as known."""

    def doubt(self) -> None:
        """Reports that the session may be another one now: its next events are in the store."""

    @property
    def place(self) -> LanePlace:
        """The place up to which it has read."""


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session and its lane at one version."""

    session: Session | None
    lane: Lane


@dataclass(slots=True)
class _Topic:
    """A followed session. The tail has all events after `start` up to `version`."""

    followers: dict[Follower, None] = field(default_factory=dict)
    version: int = 0
    start: LanePlace | None = None
    view: SessionView | None = None
    changes: int = 0


class SessionTopics:
    """The events of followed sessions. Other sessions cost one look-up for each commit."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._topics: dict[SessionKey, _Topic] = {}
        self._turns: WeakValueDictionary[str, Semaphore] = WeakValueDictionary()
        self._tails: TailPool[SessionKey, LaneEntry] = TailPool(
            lambda key: key.tenant, budget=LANE_TAIL_BYTES, entry_weight=512
        )

    @property
    def followers(self) -> int:
        """The number of followers of all sessions."""
        return sum(len(topic.followers) for topic in self._topics.values())

    @asynccontextmanager
    async def catching_up(self, tenant: str) -> AsyncIterator[None]:
        """Waits for a turn of the tenant to read a session that a stream has not caught up with."""
        turns = self._turns.setdefault(tenant, Semaphore(MAX_CATCHING_UP))
        async with turns:
            # Other calls go on between two reads, also if the store answers at once.
            await asyncio.sleep(0)
            yield

    @property
    def keys(self) -> Sequence[SessionKey]:
        """The followed sessions."""
        return tuple(self._topics)

    def add(self, key: SessionKey, follower: Follower) -> None:
        """Adds a follower."""
        self._topics.setdefault(key, _Topic()).followers[follower] = None

    def remove(self, key: SessionKey, follower: Follower) -> None:
        """Removes a follower."""
        topic = self._topics.get(key)
        if topic is None:
            return
        topic.followers.pop(follower, None)
        if not topic.followers:
            del self._topics[key]
            self._tails.drop(key)

    def on_change(self, change: LaneChange) -> None:
        """Notes a commit of this node."""
        topic = self._topics.get(change.key)
        if topic is None:
            return
        topic.changes += 1
        topic.view = None
        if change.version == 0:
            self._end(change.key, topic)
            return
        if change.version < topic.version:
            # Two connections of a store may report their commits in another order.
            self._tails.drop(change.key)
            topic.start = None
        else:
            self._add(change, topic)
        for follower in topic.followers:
            follower.wake()

    def _add(self, change: LaneChange, topic: _Topic) -> None:
        if topic.start is None or topic.version != change.base:
            # Another node committed in between, or nothing was known yet. It may have deleted the
            # session, and the places of a later one say nothing about those of its followers.
            self._tails.drop(change.key)
            topic.start = end_of(change.base)
            for follower in topic.followers:
                follower.doubt()
        topic.version = change.version
        for entry in change.entries:
            size = event_size(entry.event.body)
            self._tails.add(change.key, entry.place, entry, size, topic.start)

    def on_version(self, key: SessionKey, version: int) -> None:
        """Notes the version of a lane that other nodes change too; 0: there is no session."""
        topic = self._topics.get(key)
        # A lower one is that of a later session, or was read before a commit of this node.
        if topic is None or topic.version == version:
            return
        self._tails.drop(key)
        topic.changes += 1
        topic.version, topic.start, topic.view = version, None, None
        for follower in topic.followers:
            follower.doubt()
            follower.wake()

    def wake_all(self) -> None:
        """Wakes all followers."""
        for topic in self._topics.values():
            for follower in topic.followers:
                follower.wake()

    def read(
        self, key: SessionKey, after: LanePlace, version: int = 0
    ) -> Sequence[LaneEntry] | None:
        """The events after a place from memory; None if the store must be read.

        A view of the store may be of a `version` that this node publishes a moment later.
        """
        topic, tail = self._topics.get(key), self._tails.get(key)
        if topic is None or topic.start is None or after < topic.start or topic.version < version:
            return None
        if tail is None:
            return ()
        return tail.read(after, PAGE_ENTRIES, PAGE_BYTES) if tail.covers(after) else None

    async def view(self, key: SessionKey, reader: Follower | None = None) -> SessionView:
        """The session and its lane. All followers share one read for each version.

        The `reader` is a follower that takes what it returns for its position.
        """
        topic = self._topics.get(key)
        if topic is None:
            return await read_view(self._store, key)
        if topic.view is not None:
            return topic.view
        changes = topic.changes
        view = await read_view(self._store, key)
        if topic.changes == changes and view.lane.version >= topic.version:
            self._share(key, topic, view, reader)
        return view

    def _share(
        self, key: SessionKey, topic: _Topic, view: SessionView, reader: Follower | None
    ) -> None:
        """Shares a view that no change has overtaken, so that what follows is read from memory."""
        version = view.lane.version
        if version > topic.version:
            self._tails.drop(key)
            topic.changes += 1
            topic.version, topic.start = version, end_of(version)
            # They have not seen what led to it.
            for follower in topic.followers:
                if follower is not reader:
                    follower.doubt()
                    follower.wake()
        topic.view = view

    def _end(self, key: SessionKey, topic: _Topic) -> None:
        for follower in topic.followers:
            follower.end(self.read(key, follower.place) or ())
        self._tails.drop(key)
        # The versions of the next session with this id begin here, or where it has another start.
        topic.version, topic.start = 0, None


async def read_view(store: Store, key: SessionKey) -> SessionView:
    """Reads a session and its lane; both exist, or neither does."""
    while True:
        session = await store.get_session(key)
        lane = await store.load_lane(key)
        if (session is not None) == lane.exists:
            return SessionView(session, lane)
