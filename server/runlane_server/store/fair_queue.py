"""A queue in which tenants take turns."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")


class FairQueue(Generic[ItemT]):
    """First in, first out for each tenant; the tenants take turns, so none waits for another's
    whole queue."""

    def __init__(self) -> None:
        # In the order in which the tenants come next.
        self._queues: dict[str, deque[ItemT]] = {}

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, tenant: str, item: ItemT) -> None:
        """Adds an item to the queue of a tenant."""
        self._queues.setdefault(tenant, deque()).append(item)

    @property
    def first(self) -> ItemT:
        """The item that comes next."""
        return next(iter(self._queues.values()))[0]

    def take(self) -> ItemT:
        """Removes the item that comes next, after which its tenant comes last."""
        tenant, queue = next(iter(self._queues.items()))
        item = queue.popleft()
        del self._queues[tenant]
        if queue:
            self._queues[tenant] = queue
        return item
