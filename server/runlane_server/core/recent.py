"""What was at hand a moment ago and may be wanted again, as far as there is room for it."""

from __future__ import annotations

from typing import Generic, TypeVar

Key = TypeVar("Key")
Item = TypeVar("Item")


class RecentItems(Generic[Key, Item]):
    """The latest `room` items that were put in; the oldest is forgotten first."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._items: dict[Key, Item] = {}

    def __len__(self) -> int:
        return len(self._items)

    def put(self, key: Key, item: Item) -> None:
        """Keeps an item, for now."""
        self._items.pop(key, None)
        self._items[key] = item
        if len(self._items) > self._room:
            del self._items[next(iter(self._items))]

    def take(self, key: Key) -> Item | None:
        """Takes an item out; None if it was not put in, or is forgotten."""
        return self._items.pop(key, None)
