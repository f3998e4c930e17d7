"""The latest entries of logs, in memory, for subscribers that keep up.

All tails of a pool share one budget. When it is used up, the tenant that holds most gives up the
older half of its entries. So a tenant that holds less than an equal share loses nothing, even if
others write much.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

Entry = TypeVar("Entry")
Key = TypeVar("Key", bound=Hashable)

PAGE_BYTES = 256 << 10
"""Bytes of a page, from memory or from the store. A subscriber that reads nothing holds one."""

KEPT = 0.75
"""Fraction of the budget that an eviction leaves, so that the next one is not soon."""


class Tail(Generic[Entry]):
    """The latest entries of a log that is ordered by a number.

    It has all entries after `start`, which is None before the first entry. Each weighs its size
    and `entry_weight`, in bytes.
    """

    def __init__(self, start: int | None = None, *, entry_weight: int = 0) -> None:
        self.start = start
        self.weight = 0
        self._entry_weight = entry_weight
        self._places: list[int] = []
        self._entries: list[Entry] = []
        self._sizes: list[int] = []

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

    def read(self, after: int, limit: int, max_bytes: int) -> Sequence[Entry]:
        """Returns entries after a covered place, within both limits; at least one, if there are
        any."""
        first = bisect_right(self._places, after)
        last = min(first + limit, len(self._entries))
        for at in range(first, last):
            max_bytes -= self._sizes[at]
            if max_bytes < 0 and at > first:
                return self._entries[first:at]
        return self._entries[first:last]

    def add(self, place: int, entry: Entry, size: int) -> None:
        """Appends an entry with `size` bytes of texts. Its place must be higher than all before."""
        if self.start is None:
            self.start = place - 1
        self._places.append(place)
        self._entries.append(entry)
        self._sizes.append(size)
        self.weight += size + self._entry_weight

    def evict(self) -> int:
        """Evicts the older half, so that the cost of an entry does not depend on the length.

        Returns the weight that is freed.
        """
        if not self._places:
            return 0
        evicted = max(1, len(self._places) // 2)
        freed = sum(self._sizes[:evicted]) + evicted * self._entry_weight
        self.start = self._places[evicted - 1]
        self.weight -= freed
        del self._places[:evicted], self._entries[:evicted], self._sizes[:evicted]
        return freed


class TailPool(Generic[Key, Entry]):
    """The tails of many logs, each of one tenant, within one budget.

    Args:
        tenant_of: Returns the tenant of a log.
        budget: The total weight.
        entry_weight: The weight of an entry besides its texts, in bytes.
    """

    def __init__(self, tenant_of: Callable[[Key], str], *, budget: int, entry_weight: int) -> None:
        self._tenant_of = tenant_of
        self._budget = budget
        self._entry_weight = entry_weight
        self._tails: dict[str, dict[Key, Tail[Entry]]] = {}
        self._weights: dict[str, int] = {}
        self._total = 0

    def __len__(self) -> int:
        return sum(map(len, self._tails.values()))

    def get(self, key: Key) -> Tail[Entry] | None:
        """Returns the tail of a log, if it has one."""
        return self._tails.get(self._tenant_of(key), {}).get(key)

    def add(self, key: Key, place: int, entry: Entry, size: int, start: int | None = None) -> None:
        """Appends an entry with `size` bytes of texts. A new tail has all entries after `start`."""
        tenant = self._tenant_of(key)
        tails = self._tails.setdefault(tenant, {})
        tail = tails.get(key)
        if tail is None:
            tail = tails[key] = Tail(start, entry_weight=self._entry_weight)
        tail.add(place, entry, size)
        self._count(tenant, size + self._entry_weight)
        if self._total > self._budget:
            self._evict()

    def drop(self, key: Key) -> None:
        """Removes the tail of a log, if it has one."""
        tenant = self._tenant_of(key)
        tails = self._tails.get(tenant, {})
        tail = tails.pop(key, None)
        if tail is not None:
            self._count(tenant, -tail.weight)
        if not tails:
            self._tails.pop(tenant, None)
            self._weights.pop(tenant, None)

    def clear(self) -> None:
        """Removes all tails."""
        self._tails.clear()
        self._weights.clear()
        self._total = 0

    def _count(self, tenant: str, weight: int) -> None:
        self._weights[tenant] = self._weights.get(tenant, 0) + weight
        self._total += weight

    def _evict(self) -> None:
        heaviest = [(-weight, tenant) for tenant, weight in self._weights.items()]
        heapq.heapify(heaviest)
        while self._total > self._budget * KEPT:
            _, tenant = heaviest[0]
            self._count(tenant, -sum(tail.evict() for tail in self._tails[tenant].values()))
            heapq.heapreplace(heaviest, (-self._weights[tenant], tenant))
