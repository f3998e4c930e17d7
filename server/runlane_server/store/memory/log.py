"""The event log of the store in memory."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

from runlane_server.core.model import Micros, RunComplete, RunKey
from runlane_server.store.base import BEGINNING, EventFilter, LoggedComplete, LogPage, Position
from runlane_server.store.paging import complete_size, take_page


class MemoryLog:
    """Terminal events, numbered without gaps. The oldest may be removed."""

    def __init__(self) -> None:
        self.position: Position = BEGINNING
        self.compacted: Position = BEGINNING
        self.bytes = 0
        self._events: list[LoggedComplete] = []
        self._sizes: deque[int] = deque()
        self._positions: dict[RunKey, Position] = {}

    def add(self, tenant: str, complete: RunComplete, events_size: int) -> LoggedComplete:
        """Adds a terminal event. `events_size` is the size of the events of its run, in bytes."""
        self.position += 1
        event = LoggedComplete(self.position, tenant, complete)
        size = events_size + complete_size(event)
        self._events.append(event)
        self._sizes.append(size)
        self._positions[RunKey(tenant, complete.run_id)] = self.position
        self.bytes += size
        return event

    def remove(self, before: Micros, limit: int, keep_bytes: int | None) -> Sequence[RunKey]:
        """Removes the oldest events; returns their runs. See `Store.compact`."""
        removed: list[RunKey] = []
        for event in self._events[:limit]:
            is_too_large = keep_bytes is not None and self.bytes > keep_bytes
            if event.complete.ended_at >= before and not is_too_large:
                break
            self.bytes -= self._sizes.popleft()
            self.compacted = event.position
            removed.append(RunKey(event.tenant, event.complete.run_id))
        del self._events[: len(removed)]
        for key in removed:
            if self._positions.get(key, BEGINNING) <= self.compacted:
                self._positions.pop(key, None)
        return removed

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
