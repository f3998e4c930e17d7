"""Which accepts the quotas of a tenant let in. All of it is decided before anything is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from runlane_server.access.quotas import NO_LIMIT, Quota, QuotaBook, quota_exceeded
from runlane_server.access.stored_bytes import StoredBytes
from runlane_server.core.errors import QuotaExceeded

RETRY_AFTER = 1.0
"""Seconds after which a caller may come back whose tenant has too many runs waiting."""


@dataclass(slots=True)
class TokenBucket:
    """Accepts that a tenant may make at once. `at` is when there were so many, in seconds."""

    tokens: float
    at: float

    def take(self, now: float, rate: float, burst: int) -> float:
        """Takes one; returns 0.0, or the seconds until there is one. `rate` is in accepts per
        second, and `burst` the most that come together."""
        self.tokens = min(float(burst), self.tokens + max(0.0, now - self.at) * rate)
        self.at = now
        if self.tokens < 1:
            return (1 - self.tokens) / rate
        self.tokens -= 1
        return 0.0


class Admission:
    """Lets accepts in. One per node; `now` is in seconds, from anywhere, and never goes back."""

    def __init__(
        self,
        book: QuotaBook,
        stored: StoredBytes,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._book = book
        self._stored = stored
        self._now = now
        self._buckets: dict[str, TokenBucket] = {}
        self._under_way: dict[str, int] = {}

    def refusal(self, tenant: str, waiting: int) -> QuotaExceeded | None:
        """Why a tenant with so many runs waiting may not accept one more now; None if it may.

        An accept that may come in takes one of those that its rate allows.
        """
        quota = self._book.of(tenant)
        if quota is NO_LIMIT:
            return None
        return (
            self._too_many_waiting(tenant, quota, waiting)
            or self._too_much_stored(tenant, quota)
            or self._too_soon(tenant, quota)
        )

    def begin(self, tenant: str) -> None:
        """An accept is under way: it counts as waiting until it is known what becomes of it."""
        self._under_way[tenant] = self._under_way.get(tenant, 0) + 1

    def end(self, tenant: str) -> None:
        """An accept is over."""
        left = self._under_way.pop(tenant) - 1
        if left:
            self._under_way[tenant] = left

    def _too_many_waiting(self, tenant: str, quota: Quota, waiting: int) -> QuotaExceeded | None:
        most = quota.max_waiting_runs
        if most is None or waiting + self._under_way.get(tenant, 0) < most:
            return None
        return quota_exceeded(tenant, "max_waiting_runs", most, retry_after=RETRY_AFTER)

    def _too_much_stored(self, tenant: str, quota: Quota) -> QuotaExceeded | None:
        most = quota.max_stored_bytes
        if most is None or self._stored.of(tenant) < most:
            return None
        # Time does not help: something has to be deleted.
        return quota_exceeded(tenant, "max_stored_bytes", most)

    def _too_soon(self, tenant: str, quota: Quota) -> QuotaExceeded | None:
        rate = quota.accepts_per_second
        if rate is None:
            return None
        now = self._now()
        bucket = self._buckets.get(tenant)
        if bucket is None:
            bucket = self._buckets[tenant] = TokenBucket(float(quota.burst), now)
        left = bucket.take(now, rate, quota.burst)
        if not left:
            return None
        return quota_exceeded(tenant, "accepts_per_second", rate, retry_after=left)
