"""The contract of every store about what it measures of itself."""

from __future__ import annotations

from runlane_server.store.base import Store
from runlane_server.store.memory.store import MemoryStore
from runlane_server.store.sqlite.store import SqliteStore
from runlane_server.store.vitals import StoreVitals
from support.asking import ask, question
from support.story import START, Story, request


async def ages(store: Store) -> tuple[int | None, int | None]:
    found = await store.vitals()
    return found.waiting_since, found.asking_since


async def test_oldest_work_is_the_oldest_that_waits(store: Store, story: Story) -> None:
    other = Story(store, session_id="other", now=START + 100)
    assert await ages(store) == (None, None)
    await story.accept("active", "first", "second")
    await story.start()
    await other.accept("later")
    (first, _) = story.lane.waiting
    assert await ages(store) == (first.accepted_at, None)
    [name] = await ask(story, question())
    request = await store.get_input(story.key.tenant, name)
    assert request is not None
    assert await ages(store) == (first.accepted_at, request.requested_at)
    await story.cancel()
    await story.finish()
    (later,) = other.lane.waiting
    assert await ages(store) == (later.accepted_at, None)
    await other.cancel()
    assert await ages(store) == (None, None)


async def test_size_grows_with_what_is_stored(store: Store, story: Story) -> None:
    empty = await store.vitals()
    if isinstance(store, MemoryStore):
        assert empty == StoreVitals()
        return
    await story.accept(request("run", "large" * 100_000))
    stored = await store.vitals()
    assert empty.size is not None
    assert stored.size is not None
    assert stored.size > empty.size > 0
    # Only a file says how much room its disk has.
    assert (stored.free is not None) is isinstance(store, SqliteStore)
