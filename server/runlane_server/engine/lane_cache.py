"""Where the lanes come from that commands are decided on: kept, read, or guessed."""

from __future__ import annotations

from enum import Enum

from runlane_server.core.model import SessionKey
from runlane_server.core.recent import RecentItems
from runlane_server.core.transition import Lane
from runlane_server.engine.mailbox import Mailbox
from runlane_server.store.base import Store

RECENT = 2_000
"""How many lanes without anything under way are kept at hand."""

LIKELY = 0.95
"""The share of new sessions, of those that a run would create, from which on the next one is taken
for new before anybody has looked."""

MEMORY = 32
"""Over how many sessions that share is smoothed."""


class Sight(Enum):
    """How a lane is known."""

    AT_HAND = "at hand"  # as it was last committed or read here
    READ = "read"  # it was read just now
    GUESSED = "guessed"  # nobody looked; it is taken for that of a new session


class LaneSource:
    """Provides lanes.

    Where nearly all sessions that come into sight are new ones, looking each one up is a read that
    finds nothing. Who guesses wrong is told so by the commit, which is refused.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._recent: RecentItems[SessionKey, Lane] = RecentItems(RECENT)
        self._new = 0.0

    async def load(self, key: SessionKey, mailbox: Mailbox, *, creates: bool) -> tuple[Lane, Sight]:
        """The lane of a mailbox, which keeps its reservations: they are this process's. `creates`:
        a command is about to make the session if there is none."""
        if mailbox.lane is None:
            mailbox.lane = self._recent.take(key)
        if mailbox.lane is not None and not mailbox.outdated:
            return mailbox.lane, Sight.AT_HAND
        comes = creates and mailbox.lane is None
        if comes and not mailbox.outdated and self._new >= LIKELY:
            return Lane(key), Sight.GUESSED
        stored = await self._store.load_lane(key)
        mailbox.outdated = False
        if comes:
            self.learn(new=not stored.exists)
        held = mailbox.lane.reservations if mailbox.lane is not None else ()
        mailbox.lane = stored._replace(reservations=held)
        return mailbox.lane, Sight.READ

    def learn(self, *, new: bool) -> None:
        """A session that was to be created if need be was a new one, or was not."""
        self._new += (new - self._new) / MEMORY

    def keep(self, key: SessionKey, lane: Lane) -> None:
        """Keeps a lane at hand that has nothing under way, for now."""
        self._recent.put(key, lane)

    def forget(self, key: SessionKey) -> None:
        """A lane that was kept may be another by now."""
        self._recent.take(key)
