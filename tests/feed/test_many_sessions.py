"""Streams of many sessions: how often they read the store, and what they leave to other calls."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from runlane_server.core.model import Session, SessionKey
from runlane_server.core.transition import Lane
from runlane_server.feed.feed import Feed
from runlane_server.feed.session_topics import MAX_CATCHING_UP
from runlane_server.store.base import NewSession, Store
from support.session_reader import drain, streaming
from support.story import START, TENANT, Story

pytestmark = pytest.mark.stores("memory")

IDS = [f"s{n}" for n in range(20)]


async def create(store: Store, tenant: str = TENANT) -> None:
    for session_id in IDS:
        await store.create_session(NewSession(SessionKey(tenant, session_id), START, title="t"))


@pytest.fixture
def reads(store: Store, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The reads of the store, by name."""
    counted: Counter[str] = Counter()

    def count(name: str) -> Callable[..., Any]:
        read = getattr(type(store), name)

        async def counting(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return await read(*args, **kwargs)

        return counting

    for name in ("get_session", "load_lane", "lane_events", "run_events", "get_run"):
        monkeypatch.setattr(type(store), name, count(name))
    return counted


async def test_a_snapshot_reads_a_session_once_for_all_streams(
    store: Store, reads: Counter[str]
) -> None:
    feed = Feed(store)
    await create(store)
    reads.clear()
    session_ids = [*IDS, "missing"]
    with streaming(feed, *session_ids) as one, streaming(feed, *session_ids) as two:
        assert len(await drain(one)) == len(await drain(two)) == 2 * len(session_ids)
        assert await drain(one) == []
    assert reads == {"get_session": len(session_ids), "load_lane": len(session_ids)}


async def test_other_calls_go_on_while_a_stream_catches_up(store: Store) -> None:
    await create(store)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    with streaming(Feed(store), *IDS) as stream:
        await drain(stream)
    ticking.cancel()
    assert ticks > 2 * len(IDS)


async def test_few_streams_of_a_tenant_read_at_the_same_time(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = Feed(store)
    for tenant in ("a", "b"):
        await create(store, tenant)
    running: Counter[str] = Counter()
    highest: Counter[str] = Counter()
    read = type(store).get_session

    async def slowly(self: Store, key: SessionKey) -> Session | None:
        running[key.tenant] += 1
        highest[key.tenant] = max(highest[key.tenant], running[key.tenant])
        for _ in range(100):
            await asyncio.sleep(0)
        running[key.tenant] -= 1
        return await read(self, key)

    monkeypatch.setattr(type(store), "get_session", slowly)

    async def follow(tenant: str, session_id: str) -> None:
        with streaming(feed, session_id, tenant=tenant) as stream:
            await drain(stream)

    await asyncio.gather(*(follow(tenant, it) for it in IDS for tenant in ("a", "b")))
    assert highest == {"a": MAX_CATCHING_UP, "b": MAX_CATCHING_UP}


async def test_a_session_deleted_during_the_read_is_not_shared(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed, story = Feed(store), Story(store)
    await story.play("a")
    read = type(store).load_lane

    async def overtaken(self: Store, key: SessionKey) -> Lane:
        lane = await read(self, key)
        monkeypatch.setattr(type(store), "load_lane", read)
        await story.remove()
        return lane

    with streaming(feed, "session") as stream:
        monkeypatch.setattr(type(store), "load_lane", overtaken)
        await stream.next(0)
        assert (await feed.sessions.view(story.key)).session is None
