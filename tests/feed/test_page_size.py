"""A subscriber that reads nothing holds about a page, from memory as from the store."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runlane_server.core.model import CustomEvent, RunComplete, RunEvent, RunKey
from runlane_server.feed.event_size import event_size
from runlane_server.feed.feed import Feed
from runlane_server.feed.tail import PAGE_BYTES, Tail
from runlane_server.store.base import EventFilter, Store
from support.session_reader import drain, streaming
from support.staging import SECONDS
from support.story import TENANT, Story, answer

pytestmark = pytest.mark.stores("memory")

LARGE = "x" * 100_000


@pytest.fixture
def tailed(store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store from which nobody reads events."""

    async def never(*_: object, **__: object) -> None:
        raise AssertionError("the store was read")

    for name in ("completes", "run_events", "lane_events"):
        monkeypatch.setattr(type(store), name, never)
    return store


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 20), st.integers(0, 100))
def test_a_page_of_a_tail_is_as_long_as_both_limits_allow(
    sizes: list[int], limit: int, max_bytes: int
) -> None:
    tail = Tail[int](0)
    for place, size in enumerate(sizes, 1):
        tail.add(place, place, size)
    for after in range(len(sizes) + 1):
        page = tail.read(after, limit, max_bytes)
        assert list(page) == list(range(after + 1, after + 1 + len(page)))
        assert len(page) == 1 or sum(sizes[after : after + len(page)]) <= max_bytes
        is_last = after + len(page) == len(sizes)
        assert is_last or len(page) == limit or sum(sizes[after:][: len(page) + 1]) > max_bytes


async def play(story: Story, runs: int) -> None:
    for n in range(runs):
        await story.accept(f"r{n}")
        await story.start()
        await story.finish(replace(answer("done"), result=LARGE))


@pytest.mark.parametrize(
    "wanted", [EventFilter(), EventFilter(session_ids=frozenset({"session"}))], ids=["all", "one"]
)
async def test_a_slow_subscription_gets_large_results_page_by_page(
    tailed: Store, wanted: EventFilter
) -> None:
    feed, story = Feed(tailed), Story(tailed)
    with closing(feed.subscribe(TENANT, wanted, 0)) as slow:
        await play(story, 10)
        seen: list[str] = []
        while (page := await slow.next(0)).events:
            assert sum(event_size(it.complete) for it in page.events) <= PAGE_BYTES
            seen += [it.complete.run_id for it in page.events]
        assert seen == [f"r{n}" for n in range(10)]
        assert slow.position == feed.head


async def test_a_filtered_page_without_matches_does_not_hide_later_events(tailed: Store) -> None:
    feed, story, other = Feed(tailed), Story(tailed), Story(tailed, "other")
    with closing(feed.subscribe(TENANT, EventFilter(run_ids=frozenset({"last"})), 0)) as slow:
        await play(story, 10)
        await other.play("last")
        assert [it.complete.run_id for it in (await slow.next(SECONDS)).events] == ["last"]


async def test_a_slow_follower_of_a_run_gets_large_events_page_by_page(tailed: Store) -> None:
    feed, story = Feed(tailed), Story(tailed)
    with closing(feed.follow(RunKey(TENANT, "a"), 0)) as slow:
        await story.accept("a")
        await story.start()
        for _ in range(10):
            await story.append(CustomEvent("c", LARGE))
        seen = 0
        while seen < 12:
            page = await slow.next(0)
            assert page
            assert sum(event_size(it.body) for it in page) <= PAGE_BYTES
            seen += len(page)


async def test_a_slow_stream_of_a_session_gets_large_events_page_by_page(store: Store) -> None:
    feed, story = Feed(store), Story(store)
    with streaming(feed, "session") as slow:
        await drain(slow)
        for n in range(10):
            await story.accept(f"r{n}")
            await story.start()
            for _ in range(3):
                await story.append(CustomEvent("c", LARGE))
            await story.finish(replace(answer("done"), result=LARGE))
        (follower,) = slow._followers.values()
        seen: list[RunEvent] = []
        while (found := await slow.next(0)) is not None:
            page = [step.item for step in found[1] if isinstance(step.item, RunEvent)]
            # A step that begins within a page may be a page of output.
            assert sum(event_size(it.body) for it in page) <= 2 * PAGE_BYTES
            assert sum(event_size(it.event.body) for it in follower._entries) <= PAGE_BYTES
            seen += page
        assert sum(isinstance(it.body, RunComplete) for it in seen) == 10
        assert sum(isinstance(it.body, CustomEvent) for it in seen) == 30
