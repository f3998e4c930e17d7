"""Retries of reads: a run outlives a restart of its database."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from runlane_server.core.errors import StoreUnavailable
from runlane_server.core.limits import RETRY_PAUSE
from runlane_server.store.base import Store

T = TypeVar("T")


async def retry_read(store: Store, read: Callable[[], Awaitable[T]]) -> T:
    """Repeats a read while the store is unavailable, with no limit of time; it can be cancelled.

    Raises StoreUnavailable once the store has failed for good.
    """
    while True:
        try:
            return await read()
        except StoreUnavailable:
            if store.failed is not None:
                raise
        await asyncio.sleep(RETRY_PAUSE)
