"""Followers of runs whose session is deleted, and removed piece by piece."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest

from runlane_server.core import lane as rules
from runlane_server.core.model import CancelScope, Corrupt, FinishReason, RunComplete, TextDelta
from runlane_server.core.transition import Transition
from runlane_server.feed.feed import Feed, RunFollower
from runlane_server.store.base import Store
from support.staging import SECONDS
from support.story import Story, request

DELTAS = [TextDelta("x")] * 500


async def end_of(follower: RunFollower) -> tuple[int, RunComplete]:
    """The index and the end of a run whose other events do not matter."""
    while True:
        after = follower.after
        events = await follower.next(SECONDS)
        assert events[0].index > after
        assert not any(isinstance(event.body, Corrupt) for event in events)
        if isinstance(body := events[-1].body, RunComplete):
            return events[-1].index, body


@pytest.mark.parametrize("runs", [50, 450])
async def test_follower_that_is_behind_gets_the_end_that_the_run_had(
    store: Store, runs: int
) -> None:
    story, feed = Story(store), Feed(store)
    base = story.lane
    merged: Transition[Any] = Transition(base)
    for n in range(runs):
        merged = merged.then(story.accepting(request(f"r{n}")))
        story.lane = merged.lane
    merged = merged.then(rules.cancel(story.lane, CancelScope.SESSION, at=story.tick()))
    story.lane = base
    await story.commit(merged)
    # The first piece removes r0, the last one the last run.
    names = ("r0", f"r{runs - 1}")
    stored = [await store.get_run(story.run_key(it)) for it in names]
    followers = [feed.follow(story.run_key(it), 0) for it in names]
    await story.remove()
    for run, follower in zip(stored, followers, strict=True):
        assert run is not None
        with closing(follower):
            assert await end_of(follower) == (2, run.complete)


@pytest.mark.parametrize("pages", [1, 5])
async def test_follower_in_the_middle_of_a_long_run_gets_its_end(store: Store, pages: int) -> None:
    story, feed = Story(store), Feed(store)
    await story.accept("long")
    await story.start()
    for _ in range(pages):
        await story.append(*DELTAS)
    await story.finish()
    with closing(feed.follow(story.run_key("long"), 0)) as follower:
        await follower.next()
        await story.remove()
        index, complete = await end_of(follower)
    assert complete.finish_reason is FinishReason.STOP
    assert index >= 500 * pages


@pytest.mark.parametrize("after", [0, 700])
async def test_events_of_a_run_that_is_being_removed_are_not_listed(
    store: Store, after: int
) -> None:
    story = Story(store)
    await story.accept("long")
    await story.start()
    for _ in range(5):
        await story.append(*DELTAS)
    await story.finish()
    key = story.run_key("long")
    await story.remove()
    while True:
        assert not await store.run_events(key, after=after, limit=10, max_bytes=1 << 20)
        if not await store.remove_deleted():
            break
