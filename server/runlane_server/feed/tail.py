"""The latest entries of a log, in memory: what those who keep up are told from."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Generic, TypeVar

TAIL_EVENTS = 8192
"""How many of the latest terminal events are kept in memory, at the most."""

TAIL_BYTES = 32 << 20
"""How large the texts of the events in a tail may be together."""

Entry = TypeVar("Entry")


class Tail(Generic[Entry]):
    """The latest entries of a log that is ordered by a number; the oldest ones are forgotten.

    It knows all entries after `start`; None until the first one came.
    """

    def __init__(self) -> None:
        self.start: int | None = None
        self._places: list[int] = []
        self._entries: list[Entry] = []
        self._sizes: list[int] = []
        self._bytes = 0

    @property
    def end(self) -> int:
        """The place of the latest entry; 0 if none came."""
        return self._places[-1] if self._places else self.start or 0

    def covers(self, after: int) -> bool:
        """Whether it has all entries after that place."""
        return self.start is not None and after >= self.start

    def continues_at(self, place: int) -> bool:
        """Whether the entry at that place is the next one: nothing is missing in between."""
        return self.start is None or place == self.end + 1

    def read(self, after: int, limit: int) -> Sequence[Entry]:
        """The first entries after a place that it covers."""
        first = bisect_right(self._places, after)
        return self._entries[first : first + limit]

    def add(self, place: int, entry: Entry, size: int) -> None:
        """Appends an entry; places increase."""
        if self.start is None:
            self.start = place - 1
        self._places.append(place)
        self._entries.append(entry)
        self._sizes.append(size)
        self._bytes += size
        if len(self._places) > TAIL_EVENTS or self._bytes > TAIL_BYTES:
            self._forget()

    def _forget(self) -> None:
        """Drops the older half, so that what an entry costs does not depend on the length."""
        gone = max(1, len(self._places) // 2)
        self.start = self._places[gone - 1]
        self._bytes -= sum(self._sizes[:gone])
        del self._places[:gone], self._entries[:gone], self._sizes[:gone]
