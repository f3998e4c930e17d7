"""The quota of long-lived calls that each tenant may have open on this node."""

from __future__ import annotations

from collections import Counter

from runlane_server.access.caller import Caller
from runlane_server.access.quotas import QuotaBook, quota_exceeded
from runlane_server.core.errors import Overloaded

LONG_LIVED_METHODS = frozenset(
    {
        *(
            f"/runlane.v1.RunService/{name}"
            for name in ("SubscribeRunComplete", "SubscribeRun", "WaitRun")
        ),
        "/runlane.v1.SessionService/SubscribeSession",
        "/runlane.worker.v1.WorkerService/Work",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    }
)
"""The methods that count: each stays open until something happens."""

IDS_PER_STREAM = 100
"""A subscription counts once for each started hundred of its ids, which the server keeps."""

MAX_IDS = 100_000
"""Ids in all subscriptions of a tenant, with or without a quota; they take about 50 MB."""

RETRY_AFTER = 1.0
"""Seconds until a refused caller may retry. Calls end, and a lost client is detected within half a
minute."""


class StreamQuota:
    """Counts the open long-lived calls of each tenant."""

    def __init__(self, book: QuotaBook) -> None:
        self._book = book
        self._open: Counter[str] = Counter()
        self._ids: Counter[str] = Counter()

    def of(self, tenant: str) -> int:
        """The counts of the open calls of a tenant."""
        return self._open[tenant]

    def acquire(self, caller: Caller) -> None:
        """Counts a call that opens. Raises QuotaExceeded."""
        self._add(caller, 1, 0)

    def weigh(self, caller: Caller, ids: int) -> None:
        """Counts the ids of an open call too. Raises QuotaExceeded or Overloaded."""
        self._add(caller, stream_weight(ids) - 1, ids)

    def _add(self, caller: Caller, weight: int, ids: int) -> None:
        # Calls of other nodes are not counted here, since that node has counted them.
        if caller.peer or not (weight or ids):
            return
        tenant = caller.tenant
        most = self._book.of(tenant).max_streams
        if most is not None and weight and self._open[tenant] + weight > most:
            raise quota_exceeded(tenant, "max_streams", most, retry_after=RETRY_AFTER)
        if self._ids[tenant] + ids > MAX_IDS:
            raise Overloaded(
                f"the subscriptions of tenant {tenant!r} would have more than {MAX_IDS} ids",
                retry_after=RETRY_AFTER,
            )
        self._open[tenant] += weight
        self._ids[tenant] += ids

    def release(self, caller: Caller, ids: int = 0) -> None:
        """Stops counting a call that has closed, with the ids that were counted."""
        if caller.peer:
            return
        for counts, by in ((self._open, stream_weight(ids)), (self._ids, ids)):
            counts[caller.tenant] -= by
            if not counts[caller.tenant]:
                del counts[caller.tenant]


def stream_weight(ids: int) -> int:
    """How often a call with this number of ids counts."""
    return max(1, -(-ids // IDS_PER_STREAM))
