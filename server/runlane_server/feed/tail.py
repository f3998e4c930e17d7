"""The latest entries of a log, in memory, for subscribers that keep up."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Generic, TypeVar

TAIL_EVENTS = 8192
"""Maximum number of entries in a tail."""

TAIL_BYTES = 32 << 20
"""Maximum total size of the texts in a tail."""

Entry = TypeVar("Entry")


class Tail(Generic[Entry]):
    """The latest entries of a log that is ordered by a number; the oldest are evicted.

    It has all entries after `start`, which is None before the first entry.
    """

    def __init__(self) -> None:
        self.start: int | None = None
        self._places: list[int] = []
        self._entries: list[Entry] = []
        self._sizes: list[int] = []
        self._bytes = 0

    @property
    def end(self) -> int:
        """The place of the latest entry; 0 without one."""
        return self._places[-1] if self._places else self.start or 0

    def covers(self, after: int) -> bool:
        """Whether it has all entries after a place."""
        return self.start is not None and after >= self.start

    def continues_at(self, place: int) -> bool:
        """Whether an entry at this place is the next one, without a gap."""
        return self.start is None or place == self.end + 1

    def read(self, after: int, limit: int) -> Sequence[Entry]:
        """Returns up to `limit` entries after a covered place."""
        first = bisect_right(self._places, after)
        return self._entries[first : first + limit]

    def add(self, place: int, entry: Entry, size: int) -> None:
        """Appends an entry. Its place must be higher than all before."""
        if self.start is None:
            self.start = place - 1
        self._places.append(place)
        self._entries.append(entry)
        self._sizes.append(size)
        self._bytes += size
        if len(self._places) > TAIL_EVENTS or self._bytes > TAIL_BYTES:
            self._evict()

    def _evict(self) -> None:
        """Evicts the older half, so that the cost of an entry does not depend on the length."""
        evicted = max(1, len(self._places) // 2)
        self.start = self._places[evicted - 1]
        self._bytes -= sum(self._sizes[:evicted])
        del self._places[:evicted], self._entries[:evicted], self._sizes[:evicted]
