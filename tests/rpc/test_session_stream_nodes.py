"""SubscribeSession over several nodes of one store (R51)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from rpc.test_session_stream import Reader, accept, edit
from runlane_server.core.limits import Limits
from runlane_server.store.open import StoreUrl, open_store
from support.rpc_wire import Wire, serving
from support.staging import say, wait

pytest.importorskip("asyncpg", reason="asyncpg is not installed")


@asynccontextmanager
async def two(url: str) -> AsyncIterator[tuple[Wire, Wire]]:
    """Two nodes; only the first one executes runs."""
    async with (
        serving(store=open_store(StoreUrl.parse(url))) as first,
        serving(Limits(max_active_runs=0), store=open_store(StoreUrl.parse(url))) as second,
    ):
        yield first, second


async def test_r50_a_stream_of_one_node_has_what_happens_on_another(postgres_url: str) -> None:
    async with two(postgres_url) as (works, serves):
        reader = Reader(serves, "s")
        await reader.until("snapshot")
        await accept(works, say("one"), wait("go"), say("two"), run_id="a")
        # Its output comes while it is active.
        await reader.until("run_event", "text_delta")
        await accept(works, say("three"), run_id="b")
        queue = await reader.until("queue_changed")
        while list(queue.queue_changed.run_ids) != ["b"]:
            queue = await reader.until("queue_changed")
        works.latches.open("go")
        while ("b", "run_complete") not in [it[:2] for it in reader.events]:
            await reader.until("run_event")
        assert reader.events == [
            ("a", "accepted", 1),
            ("a", "started", 2),
            ("a", "text_delta", 3),
            ("b", "accepted", 1),
            ("a", "text_delta", 4),
            ("a", "run_complete", 5),
            ("b", "started", 2),
            ("b", "text_delta", 3),
            ("b", "run_complete", 4),
        ]
        reader.call.cancel()


async def test_r51_a_stream_resumes_on_another_node(postgres_url: str) -> None:
    async with two(postgres_url) as (works, serves):
        reader = Reader(works, "s")
        await reader.until("snapshot")
        await accept(works, say("one"), wait("go"), say("two"), run_id="a")
        last = await reader.until("run_event", "text_delta")
        reader.call.cancel()
        again = Reader(serves, "s", cursors=[last.cursor])
        await again.until("session_changed")
        works.latches.open("go")
        await again.until("run_event", "run_complete")
        assert again.events == [("a", "text_delta", 4), ("a", "run_complete", 5)]
        again.call.cancel()


async def test_r50_a_session_that_another_node_deletes_and_makes_again(postgres_url: str) -> None:
    async with two(postgres_url) as (works, serves):
        reader = Reader(serves, "s")
        await reader.until("snapshot")
        await accept(works, say("one"), run_id="a")
        await reader.until("run_event", "run_complete")
        await works.coordinator.sessions.delete("s")
        gone = await reader.until("session_changed")
        while gone.session_changed.HasField("session"):
            gone = await reader.until("session_changed")
        await accept(works, say("one"), run_id="b")
        await reader.until("run_event", "run_complete")
        assert [it[:2] for it in reader.events[-4:]] == [
            ("b", "accepted"),
            ("b", "started"),
            ("b", "text_delta"),
            ("b", "run_complete"),
        ]
        reader.call.cancel()


async def test_r50_a_session_that_another_node_changes(postgres_url: str) -> None:
    async with two(postgres_url) as (works, serves):
        await accept(works, wait("go"), say("x"), run_id="a")
        await works.latches.reached("go")
        reader = Reader(serves, "s")
        await reader.until("snapshot")
        # On the node that serves the stream: the one that works has the lane in memory.
        await edit(serves, "one")
        told = await reader.until("session_changed")
        assert told.session_changed.session.title == "one"
        await edit(works, "two")
        told = await reader.until("session_changed")
        assert told.session_changed.session.title == "two"
        works.latches.open("go")
        await reader.until("run_event", "run_complete")
        assert reader.events == [("a", "text_delta", 3), ("a", "run_complete", 4)]
        reader.call.cancel()
