"""How much tenants have stored: measured now and then, where it is limited.

A measurement lags by its pause; what was accepted here since then is added to it. What agents said
since then is not, and nor is what other nodes accepted.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Protocol

import structlog

from runlane_server.access.quotas import QuotaBook
from runlane_server.core.errors import RunlaneError

log = structlog.get_logger()

PAUSE_SECONDS = 5.0
"""Between two measurements."""

SHARE = 20
"""A pause is at least so many times as long as the measurement before it."""


class StorageMeter(Protocol):
    """What can tell how much is stored."""

    async def stored_bytes(self, tenant: str) -> int:
        """About how many bytes a tenant has stored. May raise StoreUnavailable."""


class StoredBytes:
    """How much the tenants have stored whose quota limits it."""

    def __init__(self, book: QuotaBook, store: StorageMeter) -> None:
        self._book = book
        self._store = store
        self._measured: dict[str, int] = {}
        self._since: Counter[str] = Counter()
        self._asked: set[str] = set()
        self._news = asyncio.Event()
        book.listen(self._news.set)

    def of(self, tenant: str) -> int:
        """About how many bytes a tenant has stored; until it was measured for the first time, only
        what was accepted here."""
        if tenant not in self._asked:
            self._asked.add(tenant)
            self._news.set()
        return self._measured.get(tenant, 0) + self._since[tenant]

    def add(self, tenant: str, size: int) -> None:
        """A run was accepted here, with so many bytes to store."""
        if self._book.of(tenant).max_stored_bytes is not None:
            self._since[tenant] += size

    async def measure(self) -> None:
        """Measures every tenant that is limited and was asked for, or has a quota of its own."""
        self._news.clear()
        for tenant in sorted(self._asked.union(self._book.named)):
            if self._limited(tenant):
                # What is accepted from here on may be in the measurement or not.
                before = self._since[tenant]
                self._measured[tenant] = await self._store.stored_bytes(tenant)
                self._since[tenant] -= before

    async def keep_measuring(self) -> None:
        """Measures until it is cancelled, and at once where a tenant is asked for anew."""
        while True:
            begun = time.monotonic()
            try:
                await self.measure()
            except RunlaneError as error:
                log.debug("stored bytes could not be measured", error=error.message)
            took = time.monotonic() - begun
            try:
                async with asyncio.timeout(max(PAUSE_SECONDS, SHARE * took)):
                    await self._news.wait()
            except TimeoutError:
                pass
            else:
                # Many new tenants at once are one measurement.
                await asyncio.sleep(max(0.1, SHARE * took))

    def _limited(self, tenant: str) -> bool:
        return self._book.of(tenant).max_stored_bytes is not None
