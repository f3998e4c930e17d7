"""How many calls that last a tenant has open on this node."""

from __future__ import annotations

from collections import Counter

from runlane_server.access.caller import Caller
from runlane_server.access.quotas import QuotaBook, quota_exceeded

LONG_LIVED_METHODS = frozenset(
    f"/runlane.v1.RunService/{name}" for name in ("SubscribeRunComplete", "SubscribeRun", "WaitRun")
)
"""The calls that are counted: each waits for something to happen."""

RETRY_AFTER = 1.0
"""Seconds after which a caller may come back: calls end, and those of clients that were lost are
found out within half a minute."""


class StreamQuota:
    """Counts the open calls of each tenant."""

    def __init__(self, book: QuotaBook) -> None:
        self._book = book
        self._open: Counter[str] = Counter()

    def of(self, tenant: str) -> int:
        """How many a tenant has open."""
        return self._open[tenant]

    def acquire(self, caller: Caller) -> None:
        """One more is open. Raises QuotaExceeded.

        What another node asks for was counted there, where its caller was let in.
        """
        if caller.peer:
            return
        tenant = caller.tenant
        most = self._book.of(tenant).max_streams
        if most is not None and self._open[tenant] >= most:
            raise quota_exceeded(tenant, "max_streams", most, retry_after=RETRY_AFTER)
        self._open[tenant] += 1

    def release(self, caller: Caller) -> None:
        """One that entered is closed."""
        if caller.peer:
            return
        tenant = caller.tenant
        self._open[tenant] -= 1
        if not self._open[tenant]:
            del self._open[tenant]
