"""Bugs that stores with a watch have really had, one test for each, over the wire.

One more, an acknowledgement before the data is durable, is tested in `test_disk.py`.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from proofs.crash.listeners import connected
from runlane import (
    Client,
    CursorCompacted,
    CursorInvalid,
    RunComplete,
    Subscription,
)
from runlane.types import Progress
from runlane.v1 import run_service_pb2 as pb
from support.processes import resident_bytes
from support.server import serving
from support.staging import SECONDS

pytestmark = pytest.mark.usefixtures("served_store")

FLAGS = ("--agent", "echo", "--progress-interval", "5ms")


@dataclass(frozen=True, slots=True)
class Item:
    """A message of a subscription: a run id, or None for a progress mark; and its cursor."""

    run_id: str | None
    cursor: str


async def fill(client: Client, runs: int, *, prefix: str = "r", sessions: int = 5) -> list[str]:
    """Completes `count` runs in sessions s0, s1, ...; returns their ids in the order of the log.

    Some run concurrently, so that the order differs from the one in which they were sent.
    """
    names = iter(f"{prefix}{n}" for n in range(runs))

    async def use(session_id: str) -> None:
        for name in names:
            handle = await client.run_accepted(session_id, "x", run_id=name, allow_missing=True)
            await handle.completed(SECONDS)

    await asyncio.gather(*(use(f"s{n}") for n in range(sessions)))
    return names_in(await read(client, runs, from_beginning=True))


async def read(client: Client, runs: int, **options: Any) -> list[Item]:
    """Reads a subscription until `total` runs have ended."""
    items: list[Item] = []
    async with client.subscribe_run_complete(**options) as subscription:
        async with asyncio.timeout(2 * SECONDS):
            while runs:
                items.append(item_of(await subscription.next_item(), subscription))
                runs -= items[-1].run_id is not None
    return items


def item_of(item: RunComplete | Progress, subscription: Subscription) -> Item:
    assert subscription.cursor is not None
    return Item(item.run_id if isinstance(item, RunComplete) else None, subscription.cursor)


def names_in(items: Sequence[Item]) -> list[str]:
    return [item.run_id for item in items if item.run_id is not None]


# --- Progress, time and duplicates ---------------------------------------------------------------


async def test_r25_a_progress_mark_never_passes_an_undelivered_event(tmp_path: Path) -> None:
    """A subscription that resumes from any progress mark gets exactly the events after it."""
    runs = 300
    async with serving(tmp_path, *FLAGS) as server, Client(server.address) as client:
        async with client.subscribe_run_complete(session_ids=["s0", "s1"]) as subscription:
            filling = asyncio.create_task(fill(client, runs))
            items: list[Item] = []
            log: list[str] = []
            while not filling.done() or len(names_in(items)) < len(log):
                items.append(item_of(await subscription.next_item(), subscription))
                if filling.done():
                    of_both = [run async for run in client.list_runs("s0")]
                    of_both += [run async for run in client.list_runs("s1")]
                    log = [run.run_id for run in of_both]
        marks = [n for n, item in enumerate(items) if item.run_id is None and names_in(items[n:])]
        assert len(marks) > 3
        for n in marks[:: max(1, len(marks) // 30)]:
            rest = names_in(items[n:])
            resumed = await read(
                client, len(rest), session_ids=["s0", "s1"], cursor=items[n].cursor
            )
            assert names_in(resumed) == rest


async def test_r25_events_are_never_reordered_or_repeated(tmp_path: Path) -> None:
    """A live, a late, a resumed and a restarted subscription get the same events in order."""
    runs = 120
    async with serving(tmp_path, *FLAGS) as server, Client(server.address) as client:
        live = asyncio.create_task(read(client, runs, from_beginning=True))
        log = await fill(client, runs)
        items = [item for item in await live if item.run_id is not None]
        assert names_in(items) == log
        assert sorted(log) == sorted({f"r{n}" for n in range(runs)})
        for restarts in range(2):
            for n in range(0, runs - 1, 7):
                async with connected(server.address) as stub:
                    request = pb.SubscribeRunCompleteRequest(cursor=items[n].cursor)
                    call = stub.SubscribeRunComplete(request)
                    resumed: list[str] = []
                    async for answer in call:
                        if answer.WhichOneof("event") == "run_complete":
                            resumed.append(answer.run_complete.run_id)
                        if len(resumed) == runs - n - 1:
                            break
                    assert resumed == log[n + 1 :]
                    call.cancel()
            if restarts == 0:
                await server.kill()
                await server.start()


# --- Slow watchers -------------------------------------------------------------------------------

SLOW_SESSIONS, SLOW_RUNS = 100, 54
REASON = "x" * 1000
"""All events together are more than gRPC buffers for a stream (about 4 MiB)."""

SLOW_BOUND_KIB = 128 << 10
"""KiB by which the server may grow meanwhile: the in-memory tail has at most 32 MiB, and the
encoded messages for the other subscribers take about the same again."""


async def test_r25_a_slow_subscriber_loses_nothing_and_delays_no_other(
    tmp_path: Path,
) -> None:
    total = SLOW_SESSIONS * SLOW_RUNS
    async with (
        serving(tmp_path, *FLAGS, "--log-level", "warning", "--max-active-runs", "0") as server,
        Client(server.address) as client,
        connected(server.address) as stub,
    ):
        slow = stub.SubscribeRunComplete(pb.SubscribeRunCompleteRequest(from_beginning=True))
        await slow.read()
        before = resident_bytes(server.pid) >> 10
        fast = asyncio.create_task(read(client, total, from_beginning=True))

        async def use(session_id: str) -> None:
            for _ in range(SLOW_RUNS):
                await client.run_accepted(session_id, "x", allow_missing=True)
            await client.cancel(session_id, reason=REASON)

        await asyncio.gather(*(use(f"s{n}") for n in range(SLOW_SESSIONS)))
        # The fast subscriber has all events while the slow one has not read any more.
        log = names_in(await fast)
        grown = (resident_bytes(server.pid) >> 10) - before
        got: list[str] = []
        async with asyncio.timeout(SECONDS):
            while len(got) < total:
                answer = await slow.read()
                assert isinstance(answer, pb.SubscribeRunCompleteResponse)
                if answer.WhichOneof("event") == "run_complete":
                    got.append(answer.run_complete.run_id)
        slow.cancel()
        print(f"\nthe server grew by {grown:,} KiB over {total:,} events")
        assert got == log
        assert len(set(got)) == total > 5000
        assert grown < SLOW_BOUND_KIB


# --- Compaction ----------------------------------------------------------------------------------


async def test_r25_compaction_never_skips_an_event_silently(tmp_path: Path) -> None:
    """A subscription behind a compaction gets all events, or CURSOR_COMPACTED; never a gap."""
    runs = 400
    async with serving(tmp_path, *FLAGS) as server, Client(server.address) as client:
        log = await fill(client, runs)
        items = [item for item in await read(client, runs, from_beginning=True) if item.run_id]
        await server.stop()
        # The server compacts in the background once it serves.
        await server.start("--event-retention", "1ms")
        compacted = 0
        async with asyncio.timeout(SECONDS):
            while not compacted:
                for n in range(0, runs - 1, 20):
                    got, complete = await read_after(client, items[n].cursor, runs - n - 1)
                    compacted += not complete
                    assert got == log[n + 1 : n + 1 + len(got)]


async def read_after(client: Client, cursor: str, count: int) -> tuple[list[str], bool]:
    """The ids of at most `count` runs after a cursor; and whether none of them is compacted."""
    got: list[str] = []
    try:
        async with client.subscribe_run_complete(cursor=cursor) as subscription:
            while len(got) < count:
                got.append((await anext(subscription)).run_id)
    except CursorCompacted:
        return got, False
    return got, True


async def test_r25_a_subscription_opens_exactly_at_the_compaction_point(tmp_path: Path) -> None:
    async with serving(tmp_path, *FLAGS) as server, Client(server.address) as client:
        await fill(client, 20)
        items = [item for item in await read(client, 20, from_beginning=True) if item.run_id]
        await server.stop()
        await server.start("--event-retention", "1ms")
        oldest = await compacted(client, items[0].cursor)
        # Even one event earlier is too early.
        with pytest.raises(CursorCompacted):
            await read(client, 1, cursor=items[-2].cursor)
        # The retention is now too long to remove any more events.
        await server.stop()
        await server.start()
        after = await client.run_accepted("s0", "x", run_id="after")
        await after.completed(SECONDS)
        for start in ({"cursor": oldest}, {"cursor": items[-1].cursor}, {"cursor": after.cursor}):
            assert names_in(await read(client, 1, **start)) == ["after"]
        assert names_in(await read(client, 1, from_beginning=True)) == ["after"]


async def compacted(client: Client, cursor: str) -> str:
    """Waits until events after a cursor are compacted; returns the oldest cursor left."""
    async with asyncio.timeout(SECONDS):
        while True:
            try:
                await read(client, 1, cursor=cursor)
            except CursorCompacted as error:
                # Compaction works in batches; the reported cursor is the end of one of them.
                if not await is_compacted(client, error.oldest_cursor):
                    return error.oldest_cursor


async def is_compacted(client: Client, cursor: str) -> bool:
    try:
        async with client.subscribe_run_complete(cursor=cursor):
            return False
    except CursorCompacted:
        return True


# --- Foreign cursors -----------------------------------------------------------------------------


@pytest.mark.sqlite("a copy of a file")
async def test_r25_a_cursor_from_the_future_is_refused(tmp_path: Path) -> None:
    """As after a restore of an older copy: resuming would skip the events written since."""
    async with serving(tmp_path, *FLAGS) as server, Client(server.address) as client:
        await fill(client, 5)
        await server.stop()
        shutil.copy(tmp_path / "runlane.db", tmp_path / "copy")
        await server.start()
        await fill(client, 5, prefix="later")
        future = (await read(client, 10, from_beginning=True))[-1].cursor
        await server.stop()
        shutil.copy(tmp_path / "copy", tmp_path / "runlane.db")
        await server.start()
        with pytest.raises(CursorInvalid):
            await read(client, 1, cursor=future)
        assert len(await fill(client, 6, prefix="other")) == 6


async def test_r25_a_cursor_of_another_store_is_refused(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    async with (
        serving(tmp_path / "one", *FLAGS) as one,
        serving(tmp_path / "other", *FLAGS, "--store", "sqlite:///other.db") as other,
        Client(one.address) as client,
        Client(other.address) as stranger,
    ):
        await fill(client, 5)
        await fill(stranger, 10)
        cursor = (await read(client, 3, from_beginning=True))[-1].cursor
        with pytest.raises(CursorInvalid):
            await read(stranger, 1, cursor=cursor)
