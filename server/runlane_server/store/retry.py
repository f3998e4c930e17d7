"""What is done while the store is away: a run outlives a database that restarts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from runlane_server.core.errors import StoreUnavailable
from runlane_server.core.limits import RETRY_PAUSE
from runlane_server.store.base import Store

T = TypeVar("T")


async def retry_read(store: Store, read: Callable[[], Awaitable[T]]) -> T:
    """Reads, again and again while the store is away; raises StoreUnavailable if it is lost.

    Whoever waits for so long can be cancelled.
    """
    while True:
        try:
            return await read()
        except StoreUnavailable:
            if store.failed is not None:
                raise
        await asyncio.sleep(RETRY_PAUSE)
