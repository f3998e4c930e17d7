"""Live events of runs on other nodes, for followers on this node.

Every event is stored before a follower gets it, so a relay only saves time. If the other node is
unreachable or dead, followers read from the store.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Protocol

import structlog

from runlane_server.core.errors import StoreUnavailable
from runlane_server.core.model import RunEvent, RunKey, SessionKey
from runlane_server.feed.feed import Feed
from runlane_server.store.base import Cluster

log = structlog.get_logger()

GATHER_SECONDS = 0.02
"""How long new followed runs are collected, to look up their nodes in one batch."""

SEEK_SECONDS = 0.25
"""Interval at which the node of a run is looked up while none is known."""

CHECK_SECONDS = 2.0
"""Interval at which the node of a run is checked."""

WATCH_SECONDS = 0.2
"""Interval at which followed sessions are compared with the store, in one query."""

STORE_SECONDS = 1.0
"""Interval at which the store is read while there are no live events of a run."""


class RelayBroken(Exception):
    """Another node no longer streams the events of a run."""


class Peers(Protocol):
    """The other nodes."""

    def follow(
        self, address: str, key: RunKey, after: int, on_lost: Callable[[], None]
    ) -> AsyncGenerator[RunEvent | None, None]:
        """Yields the events of a run after an index, from the node at an address; None at its end.

        `on_lost` is called when the connection is lost and will be retried. Raises RelayBroken.
        """

    async def close(self) -> None:
        """Closes all connections."""


class Relay:
    """Feeds events of followed runs from other nodes into this node. One per node."""

    def __init__(self, cluster: Cluster, feed: Feed, peers: Peers) -> None:
        self._cluster = cluster
        self._feed = feed
        self._peers = peers
        self._address = ""
        self._followed: dict[RunKey, _FollowedRun] = {}
        self._due = asyncio.Event()
        self._poller: asyncio.Task[None] | None = None
        self._watched: Counter[SessionKey] = Counter()
        self._watcher: asyncio.Task[None] | None = None
        self._is_watching = asyncio.Event()

    def start(self, address: str) -> None:
        """Starts. `address` is the one under which this node has joined the cluster."""
        self._address = address
        self._poller = asyncio.create_task(self._keep_polling())
        self._watcher = asyncio.create_task(self._keep_watching())

    async def close(self) -> None:
        """Stops relaying and closes all connections."""
        for task in (self._poller, self._watcher):
            if task is not None:
                task.cancel()
        ending = [self._poller, self._watcher, *(each.stop() for each in self._followed.values())]
        await asyncio.gather(*filter(None, ending), return_exceptions=True)
        await self._peers.close()

    @property
    def runs(self) -> int:
        """The number of runs followed here, wherever they are executed."""
        return len(self._followed)

    @contextmanager
    def follow(self, key: RunKey) -> Iterator[None]:
        """Relays the events of a run while the context is open."""
        followed = self._followed.get(key)
        if followed is None:
            followed = self._followed[key] = _FollowedRun(key, self._feed, self._peers)
            self._due.set()
        followed.followers += 1
        try:
            yield
        finally:
            followed.followers -= 1
            if not followed.followers:
                del self._followed[key]
                followed.stop()

    @contextmanager
    def watch(self, keys: Sequence[SessionKey]) -> Iterator[None]:
        """Notes what other nodes commit to these sessions while the context is open."""
        self._watched.update(keys)
        self._is_watching.set()
        try:
            yield
        finally:
            self._watched.subtract(keys)
            for key in keys:
                if not self._watched[key]:
                    del self._watched[key]

    async def _keep_watching(self) -> None:
        """Compares the versions of the watched lanes with those that this node knows."""
        while True:
            self._is_watching.clear()
            if not self._watched:
                await self._is_watching.wait()
            try:
                keys = list(self._watched)
                versions = await self._cluster.lane_versions(keys)
                for key in keys:
                    self._feed.sessions.on_version(key, versions.get(key, 0))
            except StoreUnavailable as error:
                log.debug("store unavailable", error=error.message)
            except Exception:
                log.exception("watching sessions failed")
            await asyncio.sleep(WATCH_SECONDS)

    async def _keep_polling(self) -> None:
        while True:
            await self._until_poll()
            try:
                await self._poll()
            except StoreUnavailable as error:
                log.debug("store unavailable", error=error.message)
            except Exception:
                log.exception("relay of remote runs failed")

    async def _until_poll(self) -> None:
        first = min((each.due for each in self._followed.values()), default=None)
        try:
            async with asyncio.timeout_at(first):
                await self._due.wait()
        except TimeoutError:
            return
        await asyncio.sleep(GATHER_SECONDS)
        self._due.clear()

    async def _poll(self) -> None:
        now = asyncio.get_running_loop().time()
        keys = [key for key, each in self._followed.items() if each.due <= now]
        for key in keys:
            # Set first, so that a failing store is not polled at once again.
            self._followed[key].due = now + SEEK_SECONDS
        hosts = await self._cluster.hosts(keys) if keys else {}
        for key in keys:
            if followed := self._followed.get(key):
                host = hosts.get(key)
                followed.set_host(host, here=host == self._address)


class _FollowedRun:
    """A run that is followed here, and the node that executes it, if known."""

    def __init__(self, key: RunKey, feed: Feed, peers: Peers) -> None:
        self.followers = 0
        self.due = self._now()
        self._key = key
        self._feed = feed
        self._peers = peers
        self._host: str | None = None
        self._listener: asyncio.Task[None] | None = None
        self._is_live = False
        self._stored_due = self._now()

    def set_host(self, host: str | None, *, here: bool) -> None:
        """Takes the address of the node that executes the run; None: no node does."""
        if host != self._host:
            self.stop()
            self._host = host
            self._stored_due = self._now()
        elsewhere = host is not None and not here
        if host is not None and elsewhere and self._listener is None:
            self._listener = asyncio.create_task(self._listen(host))
        self.due = self._now() + (CHECK_SECONDS if here or self._is_live else SEEK_SECONDS)
        if not self._is_live and self._stored_due <= self._now():
            self._feed.invalidate(self._key)
            self._stored_due = self._now() + STORE_SECONDS

    def stop(self) -> asyncio.Task[None] | None:
        """Stops the listener; returns its task, which is ending."""
        listening, self._listener = self._listener, None
        self._is_live = False
        if listening is not None:
            listening.cancel()
        return listening

    async def _listen(self, host: str) -> None:
        # Starts one event early: its arrival confirms at once that the stream is live.
        after = max(0, self._feed.last_index(self._key) - 1)
        try:
            async with aclosing(
                self._peers.follow(host, self._key, after, self._on_lost)
            ) as events:
                async for event in events:
                    self._is_live = True
                    self._publish(event)
        except RelayBroken as error:
            log.debug("relay of run failed", run_id=self._key.run_id, error=str(error))
        except Exception:
            log.exception("relay of run failed", run_id=self._key.run_id)
        # Unless it was stopped, the next poll tries again.
        self._on_lost()
        self._listener = None

    def _publish(self, event: RunEvent | None) -> None:
        if event is None:
            self._feed.mark_ended(self._key)
        else:
            self._feed.on_run_events(self._key, (event,))

    def _on_lost(self) -> None:
        self._is_live = False

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
