"""The quota of long-lived calls that each tenant may have open on this node."""

from __future__ import annotations

from collections import Counter

from runlane_server.access.caller import Caller
from runlane_server.access.quotas import QuotaBook, quota_exceeded

LONG_LIVED_METHODS = frozenset(
    f"/runlane.v1.RunService/{name}" for name in ("SubscribeRunComplete", "SubscribeRun", "WaitRun")
)
"""The methods that count: each waits for something to happen."""

RETRY_AFTER = 1.0
"""Seconds until a refused caller may retry. Calls end, and a lost client is detected within half a
minute."""


class StreamQuota:
    """Counts the open long-lived calls of each tenant."""

    def __init__(self, book: QuotaBook) -> None:
        self._book = book
        self._open: Counter[str] = Counter()

    def of(self, tenant: str) -> int:
        """The number of open calls of a tenant."""
        return self._open[tenant]

    def acquire(self, caller: Caller) -> None:
        """Counts a call that opens. Raises QuotaExceeded.

        Calls of other nodes are not counted here, since that node has counted them.
        """
        if caller.peer:
            return
        tenant = caller.tenant
        most = self._book.of(tenant).max_streams
        if most is not None and self._open[tenant] >= most:
            raise quota_exceeded(tenant, "max_streams", most, retry_after=RETRY_AFTER)
        self._open[tenant] += 1

    def release(self, caller: Caller) -> None:
        """Stops counting a call that has closed."""
        if caller.peer:
            return
        tenant = caller.tenant
        self._open[tenant] -= 1
        if not self._open[tenant]:
            del self._open[tenant]
