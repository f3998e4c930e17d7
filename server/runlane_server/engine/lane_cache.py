"""Provides the lanes that commands are applied to: cached, loaded, or assumed to be new."""

from __future__ import annotations

from enum import Enum

from runlane_server.core.model import SessionKey
from runlane_server.core.recent import RecentItems
from runlane_server.core.transition import Lane
from runlane_server.engine.mailbox import Mailbox
from runlane_server.store.base import Store

CAPACITY = 2_000
"""Number of lanes without pending commands that are cached."""

LIKELY = 0.95
"""Fraction of new sessions, among those that a run would create, above which the next session is
assumed to be new without a lookup."""

SMOOTHING = 32
"""Number of sessions over which that fraction is smoothed."""


class LaneOrigin(Enum):
    """How a lane became known."""

    CACHED = "cached"  # as it was last committed or loaded on this node
    LOADED = "loaded"  # read from the store just now
    ASSUMED = "assumed"  # not looked up, assumed to be that of a new session


class LaneCache:
    """Provides lanes.

    If nearly all sessions are new, a lookup is usually a read that finds nothing, so it is skipped.
    The commit detects a wrong assumption: it is refused.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._recent: RecentItems[SessionKey, Lane] = RecentItems(CAPACITY)
        self._new_fraction = 0.0

    async def load(
        self, key: SessionKey, mailbox: Mailbox, *, creates: bool
    ) -> tuple[Lane, LaneOrigin]:
        """The lane of a mailbox. It keeps its reservations, which belong to this process.

        `creates`: a command is about to create the session if it does not exist.
        """
        if mailbox.lane is None:
            mailbox.lane = self._recent.take(key)
        if mailbox.lane is not None and mailbox.lane.is_being_removed:
            mailbox.is_outdated = True  # it ends without a commit of the lane
        if mailbox.lane is not None and not mailbox.is_outdated:
            return mailbox.lane, LaneOrigin.CACHED
        is_first_sight = creates and mailbox.lane is None
        if is_first_sight and not mailbox.is_outdated and self._new_fraction >= LIKELY:
            return Lane(key), LaneOrigin.ASSUMED
        # Before the read: the lane may change during it. A failed read marks it again.
        mailbox.is_outdated = False
        stored = await self._store.load_lane(key)
        if is_first_sight:
            self.learn(new=not stored.exists)
        reservations = mailbox.lane.reservations if mailbox.lane is not None else ()
        mailbox.lane = stored._replace(reservations=reservations)
        return mailbox.lane, LaneOrigin.LOADED

    def learn(self, *, new: bool) -> None:
        """Records whether a session that a run would create was new."""
        self._new_fraction += (new - self._new_fraction) / SMOOTHING

    def keep(self, key: SessionKey, lane: Lane) -> None:
        """Caches a lane without pending commands."""
        self._recent.put(key, lane)

    def forget(self, key: SessionKey) -> None:
        """Drops a cached lane that another node may have changed."""
        self._recent.take(key)
