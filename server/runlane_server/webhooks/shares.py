"""Places that tenants share, so that some of them together leave none without."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

RESERVE = 4
"""A tenant takes a further place only while it holds less than this fraction of the free ones."""


class Shares:
    """`count` places, of which a tenant holds at most `most`.

    A tenant without one takes any free place. One that holds some takes a further one only while
    it holds less than a fraction of the free ones (`RESERVE`). So the more tenants there are the
    less each of them holds, and places stay free for others. Of those that wait the tenant that
    holds least comes next.
    """

    def __init__(self, count: int, most: int) -> None:
        self.free = count
        self.held: Counter[str] = Counter()
        self._most = most
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def taken(self, tenant: str) -> AsyncIterator[None]:
        """Holds a place."""
        await self.acquire(tenant)
        try:
            yield
        finally:
            self.release(tenant)

    async def acquire(self, tenant: str) -> None:
        """Takes a place, once the tenant may. A cancelled caller takes none."""
        if tenant not in self._waiting and self._may_take(tenant):
            self._take(tenant)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._forget(tenant, turn)
            else:
                self.release(tenant)  # it was given one already
            raise

    def release(self, tenant: str) -> None:
        """Gives a place back."""
        self.free += 1
        self.held[tenant] -= 1
        if not self.held[tenant]:
            del self.held[tenant]
        # One that becomes free may let several take theirs.
        while (other := self._next()) is not None:
            self._take(other)
            queue = self._waiting.pop(other)
            queue.popleft().set_result(None)
            if queue:
                self._waiting[other] = queue  # behind the others

    def _may_take(self, tenant: str) -> bool:
        held = self.held[tenant]
        return self.free > 0 and (not held or held < min(self._most, self.free // RESERVE))

    def _take(self, tenant: str) -> None:
        self.free -= 1
        self.held[tenant] += 1

    def _next(self) -> str | None:
        """The tenant whose longest waiting caller comes next."""
        self._drop_cancelled()
        allowed = filter(self._may_take, self._waiting)
        return min(allowed, key=lambda tenant: self.held[tenant], default=None)

    def _drop_cancelled(self) -> None:
        """Drops callers that were cancelled and have not noticed yet."""
        for tenant, queue in tuple(self._waiting.items()):
            while queue and queue[0].done():
                queue.popleft()
            if not queue:
                del self._waiting[tenant]

    def _forget(self, tenant: str, turn: asyncio.Future[None]) -> None:
        """Drops a caller that was cancelled, unless a release has dropped it."""
        queue = self._waiting.get(tenant, deque())
        if turn in queue:
            queue.remove(turn)
            if not queue:
                del self._waiting[tenant]
