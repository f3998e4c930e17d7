"""What the writer of a SQLite file puts into one transaction."""

from __future__ import annotations

import asyncio
from collections import deque

from runlane_server.core.model import RunEvent, RunKey, TextDelta
from runlane_server.store.sqlite.rows import Result, Unit, append_unit
from runlane_server.store.sqlite.writer import MAX_BATCH_CHARS, Pending, next_batch


def unit(run_id: str, chars: int) -> Unit:
    future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
    event = RunEvent(run_id, 1, 0, TextDelta("x" * chars))
    return append_unit(RunKey("t", run_id), 1, [event], future)


async def test_a_batch_has_a_limited_size_and_at_least_one_unit() -> None:
    half = MAX_BATCH_CHARS // 2 - 100
    sizes = [half, half, half, 2 * MAX_BATCH_CHARS, 1, 1]
    pending: deque[Pending] = deque(unit(str(n), size) for n, size in enumerate(sizes))
    lengths = []
    while pending:
        lengths.append(len(next_batch(pending)))
    assert lengths == [2, 1, 1, 2]
