"""A queue in which tenants take turns, and slots for which they queue."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")


class FairQueue(Generic[ItemT]):
    """First in, first out for each tenant; the tenants take turns, so none waits for another's
    whole queue."""

    def __init__(self) -> None:
        # In the order in which the tenants come next.
        self._queues: OrderedDict[str, deque[ItemT]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, tenant: str, item: ItemT) -> None:
        """Adds an item to the queue of a tenant."""
        self._queues.setdefault(tenant, deque()).append(item)

    def put_back(self, tenant: str, item: ItemT) -> None:
        """Puts an item that was taken before all others; it comes next again."""
        self._queues.setdefault(tenant, deque()).appendleft(item)
        self._queues.move_to_end(tenant, last=False)

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


class FairSlots:
    """A number of slots. The tenants that wait for one take turns."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue()

    async def acquire(self, tenant: str) -> None:
        """Takes a slot, after those that wait for one. A cancelled caller takes none."""
        if self._free and not self._waiting:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(tenant, turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self.release()  # it was given one already
            raise

    def release(self) -> None:
        """Gives a slot back, to the caller that comes next."""
        while self._waiting:
            turn = self._waiting.take()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
