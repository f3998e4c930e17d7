"""Admits accepts and questions by the quotas of their tenant, before anything is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from runlane_server.access.quotas import NO_LIMIT, Quota, QuotaBook, quota_exceeded
from runlane_server.access.stored_bytes import StoredBytes
from runlane_server.core.errors import QuotaExceeded

RETRY_AFTER = 1.0
"""Seconds until a caller may retry whose tenant has too many waiting runs."""


@dataclass(slots=True)
class TokenBucket:
    """A token bucket: `tokens` were available at the time `at`, in seconds."""

    tokens: float
    at: float

    def take(self, now: float, rate: float, burst: int, count: int = 1) -> float:
        """Takes tokens if one is available; returns 0.0, or the seconds until one is.

        `rate` is in tokens per second; `burst` is the capacity. If it takes more than are
        available, the following callers wait longer.
        """
        self.tokens = min(float(burst), self.tokens + max(0.0, now - self.at) * rate)
        self.at = now
        if self.tokens < 1:
            return (1 - self.tokens) / rate
        self.tokens -= count
        return 0.0


class QuestionRate:
    """Decides whether agents of a tenant may ask people. One per node; `now` is a monotonic
    clock."""

    def __init__(self, book: QuotaBook, *, now: Callable[[], float] = time.monotonic) -> None:
        self._book = book
        self._now = now
        self._buckets: dict[str, TokenBucket] = {}

    def refusal(self, tenant: str, count: int) -> QuotaExceeded | None:
        """Why an agent of a tenant may not ask `count` questions; None if it may, which consumes
        that many tokens."""
        quota = self._book.of(tenant)
        rate, burst = quota.questions_per_second, quota.burst_of_questions
        if rate is None or not count:
            return None
        now = self._now()
        bucket = self._buckets.setdefault(tenant, TokenBucket(float(burst), now))
        delay = bucket.take(now, rate, burst, count)
        if not delay:
            return None
        return quota_exceeded(tenant, "questions_per_second", rate, retry_after=delay)


class Admission:
    """Decides whether a tenant may accept a run. One per node; `now` is a monotonic clock."""

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
        self._in_progress: dict[str, int] = {}

    def refusal(self, tenant: str, waiting: int) -> QuotaExceeded | None:
        """Why a tenant with `waiting` waiting runs may not accept another; None if it may.

        An admitted accept consumes a token of the tenant's rate.
        """
        quota = self._book.of(tenant)
        if quota is NO_LIMIT:
            return None
        return (
            self._check_waiting(tenant, quota, waiting)
            or self._check_stored(tenant, quota)
            or self._check_rate(tenant, quota)
        )

    def session_refusal(self, tenant: str) -> QuotaExceeded | None:
        """Why a tenant may not create a session; None if it may. It consumes a token like an
        accept."""
        quota = self._book.of(tenant)
        if quota is NO_LIMIT:
            return None
        return self._check_stored(tenant, quota) or self._check_rate(tenant, quota)

    def storage_refusal(self, tenant: str, size: int) -> QuotaExceeded | None:
        """Why a tenant may not store `size` bytes more at once; None if it may."""
        return self._check_stored(tenant, self._book.of(tenant), size)

    def edit_refusal(self, tenant: str, *, grows: bool) -> QuotaExceeded | None:
        """Why a tenant may not update a run; None if it may. It consumes a token like an accept;
        `grows`: the update may store more."""
        quota = self._book.of(tenant)
        if quota is NO_LIMIT:
            return None
        full = self._check_stored(tenant, quota) if grows else None
        return full or self._check_rate(tenant, quota)

    def begin(self, tenant: str) -> None:
        """Counts an accept in progress as a waiting run, until `end`."""
        self._in_progress[tenant] = self._in_progress.get(tenant, 0) + 1

    def end(self, tenant: str) -> None:
        """Stops counting an accept in progress."""
        left = self._in_progress.pop(tenant) - 1
        if left:
            self._in_progress[tenant] = left

    def _check_waiting(self, tenant: str, quota: Quota, waiting: int) -> QuotaExceeded | None:
        most = quota.max_waiting_runs
        if most is None or waiting + self._in_progress.get(tenant, 0) < most:
            return None
        return quota_exceeded(tenant, "max_waiting_runs", most, retry_after=RETRY_AFTER)

    def _check_stored(self, tenant: str, quota: Quota, size: int = 0) -> QuotaExceeded | None:
        most = quota.max_stored_bytes
        if most is None or self._stored.of(tenant) + size < most:
            return None
        # No retry delay: waiting is futile until something is deleted.
        return quota_exceeded(tenant, "max_stored_bytes", most)

    def _check_rate(self, tenant: str, quota: Quota) -> QuotaExceeded | None:
        rate = quota.accepts_per_second
        if rate is None:
            return None
        now = self._now()
        bucket = self._buckets.get(tenant)
        if bucket is None:
            bucket = self._buckets[tenant] = TokenBucket(float(quota.burst), now)
        delay = bucket.take(now, rate, quota.burst)
        if not delay:
            return None
        return quota_exceeded(tenant, "accepts_per_second", rate, retry_after=delay)
