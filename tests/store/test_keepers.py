"""Retention in the background: what is due goes by itself, and nothing that is in use again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from runlane_server.access.caller import DEFAULT_TENANT
from runlane_server.agents.loader import AgentSettings, load_agent
from runlane_server.core.errors import SessionNotFound
from runlane_server.core.model import Micros, Prompt, SessionKey
from runlane_server.engine import retention as retention_module
from runlane_server.engine.coordinator import Coordinator
from runlane_server.engine.retention import Retention, retention_tasks
from runlane_server.feed.feed import Feed
from runlane_server.store.base import IdleSession, Store
from runlane_server.store.memory.store import MemoryStore

DAY = 86_400.0
SECONDS = 20.0
HELLO = Prompt("hello")


class Clock:
    """A wall clock that is moved by hand; it ticks, so that no two times are the same."""

    def __init__(self) -> None:
        self.seconds = 1_700_000_000.0
        self._ticks = 0

    def __call__(self) -> float:
        return self.seconds

    def micros(self) -> Micros:
        self._ticks += 1
        return int(self.seconds * 1_000_000) + self._ticks


class Watched(MemoryStore):
    """A store that counts how often it was looked for something to remove, and in which something
    may happen right after stale sessions were found."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0
        self.then: Callable[[], Awaitable[object]] | None = None

    async def compact(self, before: Micros, limit: int, *, keep_bytes: int | None = None) -> int:
        self.looks += 1
        return await super().compact(before, limit, keep_bytes=keep_bytes)

    async def stale_sessions(self, before: Micros, limit: int) -> Sequence[IdleSession]:
        found = await super().stale_sessions(before, limit)
        self.looks += 1
        if found and self.then is not None:
            then, self.then = self.then, None
            await then()
        return found

    async def looked_for(self) -> None:
        """Returns when everything that was due at the call has been removed."""
        enough = self.looks + 3
        while self.looks < enough:
            await asyncio.sleep(0)


@asynccontextmanager
async def kept(
    store: Store, clock: Clock, retention: Retention
) -> AsyncIterator[tuple[Coordinator, Callable[[], None]]]:
    """A coordinator of the echo agent; and what starts the keepers."""
    coordinator = Coordinator(
        store, load_agent("echo", AgentSettings()), Feed(store), now=clock.micros
    )
    tasks: list[asyncio.Task[None]] = []

    def begin() -> None:
        tasks.extend(
            asyncio.create_task(it) for it in retention_tasks(coordinator, retention, clock)
        )

    await coordinator.start()
    try:
        async with asyncio.timeout(SECONDS):
            yield coordinator, begin
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await coordinator.stop()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The retention tasks run continuously."""
    monkeypatch.setattr(retention_module, "SHORTEST_PAUSE", 0.001)
    monkeypatch.setattr(retention_module, "LONGEST_PAUSE", 0.001)
    monkeypatch.setattr(retention_module, "PAUSE_BY_SIZE", 0.001)


async def session_ids(store: Store) -> set[str]:
    page = await store.list_sessions(DEFAULT_TENANT, limit=1_000)
    return {session.session_id for session in page.items}


async def test_without_limits_only_what_was_deleted_is_removed() -> None:
    async with kept(MemoryStore(), Clock(), Retention()) as (coordinator, _):
        always = retention_tasks(coordinator, Retention())
        # Deleted runs are forgotten, and deleted sessions removed.
        assert [task.close() for task in always] == [None, None]


async def test_old_events_go_and_young_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention_module, "EVENTS_STEP", 2)
    store, clock = Watched(), Clock()
    async with kept(store, clock, Retention(events=7 * DAY)) as (coordinator, begin):
        for n in range(5):
            await coordinator.run(f"old{n}", HELLO)
        clock.seconds += 6 * DAY
        for n in range(3):
            await coordinator.run(f"young{n}", HELLO)
        begin()
        await store.looked_for()
        assert store.compacted == 0
        clock.seconds += DAY + 1
        while store.compacted < 5:
            await asyncio.sleep(0)
        await store.looked_for()
        assert (store.compacted, store.position) == (5, 8)
        assert await session_ids(store) >= {"old0", "young0"}


async def test_log_does_not_grow_beyond_its_size() -> None:
    store, clock = Watched(), Clock()
    async with kept(store, clock, Retention(event_bytes=20_000)) as (coordinator, begin):
        begin()
        for n in range(30):
            await coordinator.run(f"s{n % 3}", Prompt("x" * 2_000))
        while await store.log_bytes() > 20_000:
            await asyncio.sleep(0)
        await store.looked_for()
        assert 0 < await store.log_bytes() <= 20_000
        assert 0 < store.compacted < 30


async def test_stale_sessions_go_and_those_in_use_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention_module, "SESSIONS_STEP", 2)
    store, clock = Watched(), Clock()
    async with kept(store, clock, Retention(sessions=90 * DAY)) as (coordinator, begin):
        for n in range(5):
            await coordinator.run(f"stale{n}", HELLO)
        await coordinator.sessions.create("empty")
        await coordinator.run("written", HELLO)
        clock.seconds += 80 * DAY
        await coordinator.run("written", HELLO)
        await coordinator.run("young", HELLO)
        begin()
        await store.looked_for()
        assert len(await session_ids(store)) == 8
        reserved = coordinator.begin_accepted("stale3")
        clock.seconds += 11 * DAY
        while len(await session_ids(store)) > 3:
            await asyncio.sleep(0)
        await store.looked_for()
        # A session with a reservation is busy.
        assert await session_ids(store) == {"stale3", "written", "young"}
        reserved.close()
        while "stale3" in await session_ids(store):
            await asyncio.sleep(0)
        # Their ends can still be delivered.
        assert (store.compacted, store.position) == (0, 8)
        with pytest.raises(SessionNotFound):
            await coordinator.cancel("stale0")


async def test_session_that_was_used_meanwhile_stays() -> None:
    """Though it is idle again by the time it would be removed."""
    store, clock = Watched(), Clock()
    async with kept(store, clock, Retention(sessions=DAY)) as (coordinator, begin):
        await coordinator.run("s", HELLO)
        clock.seconds += 2 * DAY
        store.then = lambda: coordinator.run("s", HELLO)
        begin()
        await store.looked_for()
        session = await store.get_session(SessionKey(DEFAULT_TENANT, "s"))
        assert session is not None
        assert not session.busy
        assert store.position == 2


async def test_session_that_was_accepted_into_and_cancelled_at_once_stays() -> None:
    """The accept, its cancel and the removal are decided in one batch."""
    store, clock = Watched(), Clock()
    async with kept(store, clock, Retention(sessions=DAY)) as (coordinator, begin):
        await coordinator.run("s", HELLO)
        clock.seconds += 2 * DAY
        ends: list[asyncio.Future[object]] = []

        async def use() -> None:
            ends.append(asyncio.ensure_future(coordinator.run("s", HELLO)))
            await asyncio.sleep(0)
            ends.append(asyncio.ensure_future(coordinator.cancel("s")))
            await asyncio.sleep(0)

        store.then = use
        begin()
        await store.looked_for()
        await asyncio.gather(*ends)
        assert await session_ids(store) == {"s"}
