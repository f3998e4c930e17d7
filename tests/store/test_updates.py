"""The contract of every store about updates of waiting runs."""

from __future__ import annotations

from typing import Any

import pytest

from runlane_server.core import lane as rules
from runlane_server.core.model import Attachment, Prompt, RunRequest, SessionKey, Updated, WhenBusy
from runlane_server.core.update import Move, Place, RunContent, RunUpdate
from runlane_server.store.base import Store
from runlane_server.store.lookup import RunFilter
from runlane_server.store.weight import content_growth, run_weight
from support.story import MANY, PLENTY, TENANT, Story, request

LONG = "é\0" + "x" * 3_000
FILES = (Attachment("a", "text/plain", "é\0"), Attachment("b", "x/y", b"\0\xff"))


async def update(story: Story, run_id: str, **changes: Any) -> None:
    await story.commit(rules.update(story.lane, RunUpdate(run_id, "d", **changes), at=story.tick()))


def edited(before: RunRequest, after: RunContent) -> dict[str, Any]:
    """The changes of an edit of a run."""
    growth = content_growth(RunContent(before.prompt, before.metadata), after)
    return {"content": after, "excerpt": after.prompt.excerpt, "growth": growth}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (request("b", "short"), RunContent(Prompt(LONG, FILES), {"k": "v\0"})),
        (request("b", LONG, *FILES, k="v"), RunContent(Prompt("short"), {})),
        (request("b", LONG, *FILES), RunContent(Prompt(LONG + "!", FILES[1:]), {"l": "w"})),
    ],
)
async def test_r46_an_edit_replaces_prompt_attachments_and_labels(
    store: Store, story: Story, before: RunRequest, after: RunContent
) -> None:
    await story.accept("a", before)
    counted = await store.stored_bytes(TENANT)
    await update(story, "b", when_busy=WhenBusy.FOLD, **edited(before, after))
    run = await store.get_run(story.run_key("b"))
    assert run is not None
    assert await store.get_prompt(story.run_key("b")) == after.prompt
    assert (run.prompt_excerpt, run.metadata) == (after.prompt.excerpt, after.metadata)
    assert (run.when_busy, run.revision, run.last_update) == (WhenBusy.FOLD, 1, "d")
    # A repeated accept is compared with the request as it was.
    assert run.prompt_fingerprint == before.fingerprint
    assert await store.load_lane(story.key) == story.lane
    assert await store.stored_bytes(TENANT) - counted == run_weight(
        before._replace(prompt=after.prompt, metadata=after.metadata)
    ) - run_weight(before)
    events = await store.run_events(story.run_key("b"), after=0, limit=MANY, max_bytes=PLENTY)
    assert events[-1].body == Updated(1, after.prompt.excerpt, "fold")
    for labels, found in ((before.metadata, 0), (after.metadata, 1)):
        if labels:
            listed = await store.list_runs(TENANT, RunFilter(labels=labels), limit=9)
            assert len(listed.items) == found


async def test_r46_an_edit_leaves_other_runs_alone(store: Store, story: Story) -> None:
    other = Story(store, "other", tenant="another")
    await other.accept(request("b", LONG, *FILES, k="v"))
    await story.accept("a", request("b", LONG, *FILES), request("c", LONG, *FILES))
    await update(story, "b", **edited(request("b"), RunContent(Prompt("new"), {})))
    for place in (other.run_key("b"), story.run_key("c")):
        assert await store.get_prompt(place) == Prompt(LONG, FILES)
        run = await store.get_run(place)
        assert run is not None
        assert run.revision == 0
    assert await store.load_lane(other.key) == other.lane


async def test_r46_a_run_that_is_edited_as_it_is_accepted_has_the_edit(
    store: Store, story: Story
) -> None:
    accepted = story.accepting(request("a", LONG, *FILES, k="v"))
    wanted = RunUpdate("a", "d", content=RunContent(Prompt("new"), {}))
    both = accepted.then(rules.update(accepted.lane, wanted, at=story.tick()))
    again = RunUpdate("a", "e", when_busy=WhenBusy.FOLD)
    await story.commit(both.then(rules.update(both.lane, again, at=story.tick())))
    assert await store.get_prompt(story.run_key("a")) == Prompt("new")
    run = await store.get_run(story.run_key("a"))
    assert run is not None
    assert (run.revision, run.last_update, run.when_busy) == (2, "e", WhenBusy.FOLD)
    assert await store.load_lane(story.key) == story.lane


async def test_r47_the_order_of_the_queue_survives_as_it_was_moved(
    store: Store, story: Story
) -> None:
    await story.accept(*"abcd")
    await update(story, "d", move=Move(Place.FIRST))
    await update(story, "a", move=Move(Place.LAST))
    await update(story, "c", move=Move(Place.BEFORE, "b"))
    lane = await store.load_lane(story.key)
    assert [run.run_id for run in lane.waiting] == list("dcba")
    assert [run.accept_seq for run in lane.waiting] == [4, 3, 2, 1]
    assert lane == story.lane


async def test_r47_a_queue_without_room_between_two_runs_is_spread_out(
    store: Store, story: Story
) -> None:
    await story.accept(*"abcd")
    order, lane = list("abcd"), story.lane
    for n in range(30):
        mover = "cd"[n % 2]
        await update(story, mover, move=Move(Place.AFTER, "a"))
        order.remove(mover)
        order.insert(1, mover)
        lane = await store.load_lane(story.key)
        assert [run.run_id for run in lane.waiting] == order
    assert lane == story.lane
    assert [run.revision for run in lane.waiting] == [0, 15, 15, 0]


async def test_r47_a_restart_finds_the_head_that_was_moved_there(
    store: Store, story: Story
) -> None:
    await story.accept(request("a"), request("b"))
    await update(story, "b", move=Move(Place.FIRST))
    key = await story.start()
    assert key == story.run_key("b")
    assert await store.load_lane(SessionKey(TENANT, "session")) == story.lane
