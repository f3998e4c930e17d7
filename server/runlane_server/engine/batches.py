"""Awaits work on many sessions, a bounded number at a time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Iterable

BATCH_SIZE = 500
"""Number of sessions that are worked on at a time where all sessions are concerned."""


async def await_in_batches(work: Iterable[Awaitable[object]]) -> None:
    """Awaits everything, `BATCH_SIZE` at a time."""
    rest = iter(work)
    while batch := list(itertools.islice(rest, BATCH_SIZE)):
        await asyncio.gather(*batch)
