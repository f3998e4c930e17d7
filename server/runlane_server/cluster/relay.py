"""What happens in runs on other nodes, as it happens, for those who follow such a run here.

All that a follower is shown is stored before; so a relay saves him the wait, and nothing else.
Where the other node cannot be reached, or is gone, he is told from the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Protocol

import structlog

from runlane_server.core.errors import StoreUnavailable
from runlane_server.core.model import RunEvent, RunKey
from runlane_server.feed.feed import Feed
from runlane_server.store.base import Cluster

log = structlog.get_logger()

GATHER_SECONDS = 0.02
"""For how long those are gathered who begin to follow a run, to ask for all of them at once."""

SEEK_SECONDS = 0.25
"""How often it looks where a run is that no node is known to execute."""

CHECK_SECONDS = 2.0
"""How often it looks whether a run is still where it was."""

STORE_SECONDS = 1.0
"""How often the store is read where the node that executes a run says nothing."""


class RunLost(Exception):
    """Another node does not tell about a run any more."""


class Peers(Protocol):
    """The other nodes, as clients see them."""

    def follow(
        self, address: str, key: RunKey, after: int, on_lost: Callable[[], None]
    ) -> AsyncGenerator[RunEvent | None, None]:
        """The events of a run after an index, from the node at an address; None for its end.

        `on_lost` is called where the connection is lost, and made again. Raises RunLost.
        """

    async def close(self) -> None:
        """Closes all connections."""


class Relay:
    """Tells the feed of this node what is followed here and happens elsewhere. One per node."""

    def __init__(self, cluster: Cluster, feed: Feed, peers: Peers) -> None:
        self._cluster = cluster
        self._feed = feed
        self._peers = peers
        self._address = ""
        self._followed: dict[RunKey, _Followed] = {}
        self._due = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    def start(self, address: str) -> None:
        """Begins. `address` is the one under which this node itself has joined the others."""
        self._address = address
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Follows nothing any more."""
        if self._watching is not None:
            self._watching.cancel()
        ending = [self._watching, *(each.stop() for each in self._followed.values())]
        await asyncio.gather(*filter(None, ending), return_exceptions=True)
        await self._peers.close()

    @property
    def runs(self) -> int:
        """How many runs are followed here, wherever they are executed."""
        return len(self._followed)

    @contextmanager
    def follow(self, key: RunKey) -> Iterator[None]:
        """Relays what happens in a run, as long as it is followed here."""
        followed = self._followed.get(key)
        if followed is None:
            followed = self._followed[key] = _Followed(key, self._feed, self._peers)
            self._due.set()
        followed.followers += 1
        try:
            yield
        finally:
            followed.followers -= 1
            if not followed.followers:
                del self._followed[key]
                followed.stop()

    async def _watch(self) -> None:
        while True:
            await self._until_due()
            try:
                await self._look()
            except StoreUnavailable as error:
                log.debug("the store is away", error=error.message)
            except Exception:
                log.exception("runs on other nodes cannot be followed")

    async def _until_due(self) -> None:
        first = min((each.due for each in self._followed.values()), default=None)
        try:
            async with asyncio.timeout_at(first):
                await self._due.wait()
        except TimeoutError:
            return
        await asyncio.sleep(GATHER_SECONDS)
        self._due.clear()

    async def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        keys = [key for key, each in self._followed.items() if each.due <= now]
        for key in keys:
            # Where the store does not answer, not at once again.
            self._followed[key].due = now + SEEK_SECONDS
        hosts = await self._cluster.hosts(keys) if keys else {}
        for key in keys:
            if followed := self._followed.get(key):
                host = hosts.get(key)
                followed.is_at(host, here=host == self._address)


class _Followed:
    """A run that is followed here, and where it is executed as far as is known."""

    def __init__(self, key: RunKey, feed: Feed, peers: Peers) -> None:
        self.followers = 0
        self.due = self._now()
        self._key = key
        self._feed = feed
        self._peers = peers
        self._host: str | None = None
        self._listening: asyncio.Task[None] | None = None
        self._hears = False
        self._stored_due = self._now()

    def is_at(self, host: str | None, *, here: bool) -> None:
        """The run is executed by the node at that address, by this one, or by none."""
        if host != self._host:
            self.stop()
            self._host = host
            self._stored_due = self._now()
        elsewhere = host is not None and not here
        if host is not None and elsewhere and self._listening is None:
            self._listening = asyncio.create_task(self._listen(host))
        self.due = self._now() + (CHECK_SECONDS if here or self._hears else SEEK_SECONDS)
        if not self._hears and self._stored_due <= self._now():
            self._feed.look(self._key)
            self._stored_due = self._now() + STORE_SECONDS

    def stop(self) -> asyncio.Task[None] | None:
        """Does not listen any more; returns what is ending because of that."""
        listening, self._listening = self._listening, None
        self._hears = False
        if listening is not None:
            listening.cancel()
        return listening

    async def _listen(self, host: str) -> None:
        # One that is known already tells at once that the other node is heard.
        after = max(0, self._feed.reached(self._key) - 1)
        try:
            async with aclosing(self._peers.follow(host, self._key, after, self._lost)) as events:
                async for event in events:
                    self._hears = True
                    self._tell(event)
        except RunLost as error:
            log.debug("a run cannot be followed", run_id=self._key.run_id, error=str(error))
        except Exception:
            log.exception("a run cannot be followed", run_id=self._key.run_id)
        # Unless it was stopped, it is to be tried again.
        self._lost()
        self._listening = None

    def _tell(self, event: RunEvent | None) -> None:
        if event is None:
            self._feed.ended(self._key)
        else:
            self._feed.on_run_events(self._key, (event,))

    def _lost(self) -> None:
        self._hears = False

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
