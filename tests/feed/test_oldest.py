"""The oldest position of a session, from which a stream resumes after a compaction (R51)."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest

from runlane_server.core.errors import CursorCompacted
from runlane_server.core.model import CancelScope, RunEvent, TextDelta
from runlane_server.feed.feed import Feed
from runlane_server.feed.oldest import oldest_place
from runlane_server.feed.sessions import SessionPlace
from runlane_server.store.base import Store
from runlane_server.store.sqlite import compact
from runlane_server.store.sqlite.store import SqliteStore
from support.asking import answer, ask, question, resume
from support.session_reader import drain, streaming
from support.story import START, Story

FUTURE = START + 1_000_000_000


async def told(store: Store, story: Story) -> list[str]:
    """The texts and the other events of a stream from the oldest position."""
    at = await oldest_place(store, story.key)
    with streaming(Feed(store), story.session_id, at=at) as stream:
        events = [it.item for it in await drain(stream) if isinstance(it.item, RunEvent)]
    return [
        it.body.text if isinstance(it.body, TextDelta) else f"{it.run_id}: {type(it.body).__name__}"
        for it in events
    ]


async def test_r51_output_of_the_run_that_is_active_at_the_start_is_not_skipped(
    store: Store,
) -> None:
    story = Story(store)
    await story.accept("a", "b", "c")
    await story.start()
    await story.append(TextDelta("1"))
    await story.cancel(CancelScope.RUN, "b")
    assert await store.compact(FUTURE, 1) == 1
    await story.append(TextDelta("2"))
    assert await told(store, story) == ["1", "2"]
    await story.cancel(CancelScope.RUN, "c")
    await story.accept("d")
    await story.append(TextDelta("3"))
    await story.finish()
    await story.start()
    assert await told(store, story) == [
        "c: RunComplete",
        "d: Accepted",
        "1",
        "2",
        "3",
        "a: RunComplete",
        "d: Started",
    ]


async def test_r51_output_after_a_question_that_was_removed_from_the_log(store: Store) -> None:
    story = Story(store)
    await story.accept("a", "b")
    await story.start()
    await story.append(TextDelta("1"))
    (name,) = await ask(story, question())
    await answer(story, "a", name)
    await resume(story)
    await story.append(TextDelta("2"))
    await story.cancel(CancelScope.RUN, "b")
    assert await store.compact(FUTURE, 1) == 1
    assert await told(store, story) == ["2"]


async def test_r51_start_where_no_run_was_active(store: Store) -> None:
    story = Story(store)
    await story.play("a")
    await story.accept("b")
    await story.start()
    await story.append(TextDelta("1"))
    assert await store.compact(FUTURE, 1) == 1
    assert await told(store, story) == ["b: Accepted", "b: Started", "1"]


async def test_r51_half_removed_run_leaves_an_oldest_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact, "STEP_ROWS", 10)
    async with SqliteStore(tmp_path / "runlane.db") as store:
        story = Story(store)
        await story.accept("a")
        await story.start()
        await story.append(*(TextDelta(f"{n}") for n in range(32)))
        await story.finish()
        session = await store.get_session(story.key)
        assert session is not None
        step = asyncio.create_task(store.compact(FUTURE, 9))
        for n in itertools.count():
            # A write is committed between two steps.
            await Story(store, f"other {n}").accept(f"b{n}")
            assert not step.done()
            try:
                await store.lane_events(story.key, after=0, limit=1, max_bytes=1)
            except CursorCompacted:
                break
        at = await oldest_place(store, story.key)
        assert at == SessionPlace(session.created_at)
        assert await step == 1
        assert (await oldest_place(store, story.key)).place > 0
