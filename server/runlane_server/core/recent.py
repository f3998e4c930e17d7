"""A bounded cache of items that are likely to be used again soon."""

from __future__ import annotations

from typing import Generic, TypeVar

Key = TypeVar("Key")
Item = TypeVar("Item")


class RecentItems(Generic[Key, Item]):
    """Keeps the `capacity` items that were put in last and evicts the oldest first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: dict[Key, Item] = {}

    def __len__(self) -> int:
        return len(self._items)

    def put(self, key: Key, item: Item) -> None:
        """Adds or replaces an item, and evicts the oldest one if the cache is full."""
        self._items.pop(key, None)
        self._items[key] = item
        if len(self._items) > self._capacity:
            del self._items[next(iter(self._items))]

    def take(self, key: Key) -> Item | None:
        """Removes an item and returns it; None if it was never put in or has been evicted."""
        return self._items.pop(key, None)
