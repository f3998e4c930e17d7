"""Every store keeps the order of the events of a session (R52), and reports what it removed."""

from __future__ import annotations

import pytest

from runlane_server.core.errors import CursorCompacted
from runlane_server.core.model import RunComplete, SessionKey, TextDelta
from runlane_server.core.transition import Lane
from runlane_server.store.base import NewSession, Store
from runlane_server.store.lane_log import LaneEntry, LanePage, end_of, place_of, version_of
from support.story import PLENTY, START, TENANT, Story, Witness, request

FUTURE = START + 1_000_000


async def page(store: Store, key: SessionKey, after: int = 0) -> LanePage:
    return await store.lane_events(key, after=after, limit=1000, max_bytes=PLENTY)


def names(entries: tuple[LaneEntry, ...]) -> list[str]:
    return [f"{it.event.run_id} {type(it.event.body).__name__}" for it in entries]


def test_places_are_ordered_by_version_and_number() -> None:
    assert place_of(3, 1) < place_of(3, 2) < end_of(3) < place_of(4, 1)
    assert version_of(place_of(3, 2)) == 3


async def test_r52_events_of_all_runs_have_one_order(store: Store) -> None:
    store.listener = witness = Witness()
    story = Story(store)
    await story.accept("a", "b")
    await story.start()
    await story.append(TextDelta("x"), TextDelta("y"))
    await story.accept("c")
    await story.finish()
    await story.start()
    await story.cancel()
    await story.finish()
    read = await page(store, story.key)
    assert names(read.entries) == [
        "a Accepted",
        "b Accepted",
        "a Started",
        "c Accepted",
        "a RunComplete",
        "b Started",
        "c RunComplete",
        "b RunComplete",
    ]
    places = [entry.place for entry in read.entries]
    assert places == sorted(set(places))
    assert read.start == 0
    session = await store.get_session(story.key)
    assert session is not None
    assert read.created_at == session.created_at
    told = [entry for change in witness.lanes for entry in change.entries]
    assert [it.place for it in told] == places
    assert [(it.base, it.version) for it in witness.lanes] == [(n, n + 1) for n in range(8)]
    rest = await page(store, story.key, places[4])
    assert rest.entries == read.entries[5:]


async def test_pages_are_limited_in_number_and_size(store: Store) -> None:
    story = Story(store)
    await story.play("a", "z" * 5_000)
    await story.play("b", "z" * 5_000)
    whole = (await page(store, story.key)).entries
    assert [type(it.event.body) for it in whole].count(RunComplete) == 2
    two = await store.lane_events(story.key, after=0, limit=2, max_bytes=PLENTY)
    assert two.entries == whole[:2]
    small = await store.lane_events(story.key, after=0, limit=9, max_bytes=1)
    assert small.entries == whole[:1]


async def test_r51_removed_events_are_reported(store: Store) -> None:
    story = Story(store)
    await story.play("a")
    await story.accept("b")
    before = (await page(store, story.key)).entries
    await story.start()
    await story.finish()
    await story.accept("c")
    assert await store.compact(FUTURE, 1) == 1
    kept = await page(store, story.key, before[2].place)
    assert kept.start == before[2].place
    assert names(kept.entries) == ["b Accepted", "b Started", "b RunComplete", "c Accepted"]
    assert await store.compact(FUTURE, 1) == 1
    last = await page(store, story.key)
    assert last.start == kept.entries[2].place
    assert names(last.entries) == ["c Accepted"]


async def test_session_without_events_has_none(store: Store) -> None:
    key = SessionKey(TENANT, "empty")
    assert await page(store, key) == LanePage()
    store.listener = witness = Witness()
    await store.create_session(NewSession(key, START))
    assert await page(store, key) == LanePage((), 0, START)
    (change,) = witness.lanes
    assert (change.key, change.base) == (key, 0)


async def test_removed_session_leaves_no_log_to_the_next_one(store: Store) -> None:
    store.listener = witness = Witness()
    story = Story(store)
    await story.play("a")
    old = (await page(store, story.key)).entries
    await story.remove()
    assert await page(store, story.key) == LanePage()
    assert witness.lanes[-1].version == 0
    story.lane = Lane(story.key)
    await story.play("b")
    read = await page(store, story.key)
    assert names(read.entries) == ["b Accepted", "b Started", "b RunComplete"]
    assert [it.place for it in read.entries] == [
        it.place for change in witness.lanes[-3:] for it in change.entries
    ]
    assert {it.event.run_id for it in old} == {"a"}


async def test_r21_discarded_session_leaves_no_log(store: Store) -> None:
    store.listener = witness = Witness()
    story = Story(store)
    await story.accept("a")
    await store.discard(story.key, START)
    assert await page(store, story.key) == LanePage()
    assert witness.lanes[-1].version == 0


async def test_r51_end_that_is_half_removed_is_no_gap(store: Store) -> None:
    """A page never skips an event silently, also beside a compaction."""
    story = Story(store)
    await story.accept(request("a"), request("b"))
    await story.start()
    await story.finish()
    first = (await page(store, story.key)).entries[0]
    assert await store.compact(FUTURE, 9) == 1
    after = await page(store, story.key, first.place)
    # The place of the first event lies before the start, and a reader there gets an error.
    assert first.place < after.start
    with pytest.raises(CursorCompacted):
        await store.run_events(story.run_key("a"), after=0, limit=9, max_bytes=PLENTY)
