"""How much each limited tenant has stored, measured periodically.

Between two measurements, runs accepted on this node are added, and copies that it makes as long as
they take. Output of agents and runs of other nodes appear only in the next measurement.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import structlog

from runlane_server.access.quotas import QuotaBook
from runlane_server.core.errors import RunlaneError

log = structlog.get_logger()

PAUSE_SECONDS = 5.0
"""Pause between two measurements."""

MIN_PAUSE_RATIO = 20
"""A pause lasts at least this many times as long as the measurement before it."""


class StorageMeter(Protocol):
    """A store that can measure itself."""

    async def stored_bytes(self, tenant: str) -> int:
        """Estimates the bytes that a tenant has stored. May raise StoreUnavailable."""


class StoredBytes:
    """Estimates the stored bytes of tenants whose quota limits them."""

    def __init__(self, book: QuotaBook, store: StorageMeter) -> None:
        self._book = book
        self._store = store
        self._measured: dict[str, int] = {}
        self._accepted_since: Counter[str] = Counter()
        self._at_work: Counter[str] = Counter()
        self._tenants: set[str] = set()
        self._wakeup = asyncio.Event()
        book.listen(self._wakeup.set)

    def of(self, tenant: str) -> int:
        """Estimated bytes of a tenant; before its first measurement, only runs accepted here."""
        if tenant not in self._tenants:
            self._tenants.add(tenant)
            self._wakeup.set()
        added = self._accepted_since[tenant] + self._at_work[tenant]
        return self._measured.get(tenant, 0) + added

    def add(self, tenant: str, size: int) -> None:
        """Adds the size of a run accepted here, in bytes."""
        if self._book.of(tenant).max_stored_bytes is not None:
            self._accepted_since[tenant] += size

    @contextmanager
    def adding(self, tenant: str, size: int) -> Iterator[None]:
        """Counts bytes while they are written, which may outlast measurements that do not see them;
        from then on as `add` does, unless the writing fails."""
        self._at_work[tenant] += size
        try:
            yield
            self.add(tenant, size)
        finally:
            self._at_work[tenant] -= size
            if not self._at_work[tenant]:
                del self._at_work[tenant]

    async def measure(self) -> None:
        """Measures every limited tenant that was asked for or has its own quota."""
        self._wakeup.clear()
        for tenant in sorted(self._tenants.union(self._book.named)):
            if self._is_limited(tenant):
                # Accepts during the measurement may or may not be in it; they stay added.
                before = self._accepted_since[tenant]
                self._measured[tenant] = await self._store.stored_bytes(tenant)
                self._accepted_since[tenant] -= before

    async def keep_measuring(self) -> None:
        """Measures until cancelled: periodically, and soon after a new tenant appears."""
        while True:
            begun = time.monotonic()
            try:
                await self.measure()
            except RunlaneError as error:
                log.debug("stored bytes not measured", error=error.message)
            took = time.monotonic() - begun
            try:
                async with asyncio.timeout(max(PAUSE_SECONDS, MIN_PAUSE_RATIO * took)):
                    await self._wakeup.wait()
            except TimeoutError:
                pass
            else:
                # Several new tenants at once share one measurement.
                await asyncio.sleep(max(0.1, MIN_PAUSE_RATIO * took))

    def _is_limited(self, tenant: str) -> bool:
        return self._book.of(tenant).max_stored_bytes is not None
