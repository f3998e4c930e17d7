"""The event log of the store in memory."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

from runlane_server.core.model import Micros, RunComplete, RunKey
from runlane_server.store.base import BEGINNING, EventFilter, LoggedComplete, LogPage, Position
from runlane_server.store.compaction import CompactedPositions, largest_log
from runlane_server.store.paging import complete_size, take_page


class MemoryLog:
    """Terminal events, numbered without gaps. The oldest ones of a tenant may be removed."""

    def __init__(self) -> None:
        self.position: Position = BEGINNING
        self.compacted = CompactedPositions()
        self._bytes: Counter[str] = Counter()
        self._events: list[LoggedComplete] = []
        self._sizes: dict[Position, int] = {}
        self._positions: dict[RunKey, Position] = {}

    def add(self, tenant: str, complete: RunComplete, events_size: int) -> LoggedComplete:
        """Adds a terminal event. `events_size` is the size of the events of its run, in bytes."""
        self.position += 1
        event = LoggedComplete(self.position, tenant, complete)
        size = events_size + complete_size(event)
        self._events.append(event)
        self._sizes[self.position] = size
        self._positions[RunKey(tenant, complete.run_id)] = self.position
        self._bytes[tenant] += size
        return event

    @property
    def bytes(self) -> int:
        """The approximate size of all events, with those of their runs."""
        return self._bytes.total()

    def remove(self, before: Micros, limit: int, keep_bytes: int | None) -> Sequence[RunKey]:
        """Removes the oldest events; returns their runs. See `Store.compact`."""
        removed: list[RunKey] = []
        for event in tuple(self._events[:limit]):
            if event.complete.ended_at >= before:
                break
            removed.append(self._remove(event))
        largest = largest_log(self._bytes.values(), keep_bytes)
        if largest is not None:
            for event in tuple(self._events):
                if self._bytes[event.tenant] > largest and len(removed) < limit:
                    removed.append(self._remove(event))
        return removed

    def _remove(self, event: LoggedComplete) -> RunKey:
        self._events.remove(event)
        self._bytes[event.tenant] -= self._sizes.pop(event.position)
        if not self._bytes[event.tenant]:
            del self._bytes[event.tenant]
        self.compacted.note(event.tenant, event.position)
        key = RunKey(event.tenant, event.complete.run_id)
        if self._positions.get(key) == event.position:
            del self._positions[key]
        return key

    def position_of(self, key: RunKey) -> Position | None:
        """The position of the last terminal event with this run id."""
        return self._positions.get(key)

    def page(
        self, tenant: str, wanted: EventFilter, *, after: Position, limit: int, max_bytes: int
    ) -> LogPage:
        """Terminal events after a position."""
        first = bisect_right(self._events, after, key=lambda event: event.position)
        events = (
            event
            for event in self._events[first:]
            if event.tenant == tenant and wanted.matches(event.complete)
        )
        page, more = take_page(events, limit=limit, max_bytes=max_bytes, size=complete_size)
        return LogPage(tuple(page), page[-1].position if more else max(after, self.position))
