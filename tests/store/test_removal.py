"""A deleted session is gone at once; what belonged to it is removed piece by piece."""

from __future__ import annotations

from typing import Any

import pytest

from runlane_server.core import lane as rules
from runlane_server.core.input import InputState
from runlane_server.core.model import CancelScope, RunKey
from runlane_server.core.transition import Lane, Transition
from runlane_server.store.base import DeletedRun, NewSession, RunIdTaken, SessionTaken, Stale, Store
from runlane_server.store.lookup import RunFilter
from runlane_server.store.open import StoreUrl, open_store
from runlane_server.store.sqlite.check import check as sqlite_check
from support.asking import ask, question
from support.story import START, TENANT, Story, request

RUNS = 450
"""More than two pieces, each of 200 runs."""


async def fill(story: Story, count: int = RUNS) -> None:
    """Runs that a cancel has ended, in one commit."""
    base = story.lane
    merged: Transition[Any] = Transition(base)
    for n in range(count):
        merged = merged.then(story.accepting(request(f"r{n}")))
        story.lane = merged.lane
    merged = merged.then(rules.cancel(story.lane, CancelScope.SESSION, at=story.tick()))
    story.lane = base
    await story.commit(merged)


async def is_sound(store_url: str) -> bool:
    """Whether the check of a store finds nothing; the one in memory has none."""
    url = StoreUrl.parse(store_url)
    if store_url.startswith("sqlite:"):
        return not sqlite_check(url.file).problems
    if store_url.startswith("postgresql:"):
        from runlane_server.store.postgres.check import check  # noqa: PLC0415 - an optional extra
        from runlane_server.store.postgres.database import Database  # noqa: PLC0415

        return not (await check(Database.parse(store_url))).problems
    return True


async def left(store: Store) -> int:
    """Removes the rest; returns the number of pieces."""
    pieces = 0
    while await store.remove_deleted():
        pieces += 1
    return pieces


async def test_r03_large_session_is_gone_at_once_and_its_id_is_taken_until_all_is_removed(
    store: Store, story: Story, store_url: str
) -> None:
    await Story(store, "other").play("kept")
    size = await store.stored_bytes(TENANT)
    await fill(story)
    fingerprint = request("r0").fingerprint
    await story.remove()

    for _ in range(3):  # as long as it lasts, and at least after the first piece
        assert await store.get_session(story.key) is None
        assert await store.load_lane(story.key) == Lane(story.key, is_being_removed=True)
        for run_id in ("r0", f"r{RUNS - 1}"):
            assert await store.get_run(story.run_key(run_id)) is None
            deleted = await store.get_deleted_run(story.run_key(run_id))
            assert deleted == DeletedRun(story.session_id, fingerprint, events=2)
        listed = await store.list_runs(TENANT, limit=2 * RUNS)
        assert [run.run_id for run in listed.items] == ["kept"]
        assert (await store.count_runs(TENANT, RunFilter())).items == 1
        assert not (await store.list_runs(TENANT, RunFilter(session_id="session"), limit=9)).items
        assert await store.stored_bytes(TENANT) == size
        with pytest.raises(SessionTaken):
            await store.create_session(NewSession(story.key, START))
        with pytest.raises(Stale):
            await Story(store).accept("new")
        with pytest.raises(RunIdTaken):
            await Story(store, "another").accept("r7")
        assert await is_sound(store_url)
        if (await store.load_lane(story.key)).is_being_removed:
            await store.remove_deleted()
        if not (await store.load_lane(story.key)).is_being_removed:
            break
    else:
        pytest.fail("it did not end")

    assert await left(store) == 0
    assert (await store.get_deleted_run(story.run_key("r449"))) is not None
    again = Story(store, now=story.now)
    again.lane = await store.load_lane(again.key)
    assert again.lane == Lane(story.key)
    await again.play("new")
    assert await is_sound(store_url)


async def test_small_session_is_removed_with_the_commit_that_deletes_it(
    store: Store, story: Story
) -> None:
    await fill(story, 50)
    await story.remove()
    assert not await store.remove_deleted()
    await store.create_session(NewSession(story.key, START))


@pytest.mark.stores("sqlite")
@pytest.mark.sqlite("no other writes wait for a piece elsewhere")
async def test_a_piece_has_few_large_texts(store: Store, story: Story, store_url: str) -> None:
    """Other writes to a file wait for the end of a piece."""
    for n in range(12):
        await story.play(request(f"r{n}", "x" * 500_000), "y" * 1_000_000)
    await story.remove()
    # 12 MB of answers, 6 MB of prompts in messages or beside runs: 4 MiB, and a row, in each piece.
    assert 3 <= await left(store) <= 8
    assert await is_sound(store_url)
    await store.create_session(NewSession(story.key, START))


async def test_discarded_session_keeps_no_open_run_however_large_it_is(
    store: Store, story: Story, store_url: str
) -> None:
    await fill(story)
    await story.accept("active", "waiting")
    await story.start()
    await store.discard(story.key, story.tick())
    assert await store.busy_sessions() == []
    assert (await store.get_run(RunKey(TENANT, "active"))) is None
    assert await left(store) > 0
    assert await is_sound(store_url)


async def test_discarded_session_asks_nothing_any_more(store: Store, story: Story) -> None:
    await fill(story, 600)  # its requests do not go with the first piece
    await story.accept("asks")
    await story.start()
    [name] = await ask(story, question(timeout=1))
    assert await store.due_inputs(2 * START, 9)
    await store.discard(story.key, story.tick())
    while True:
        assert await store.get_input(TENANT, name) is None
        for states in ([InputState.OPEN], [*InputState]):
            assert not (await store.list_inputs(TENANT, states=states, limit=9)).items
        assert not await store.due_inputs(2 * START, 9)
        assert (await store.vitals()).asking_since is None
        if not await store.remove_deleted():
            break


@pytest.mark.stores("sqlite", "postgresql")
async def test_removal_continues_after_a_restart(store_url: str) -> None:
    url = StoreUrl.parse(store_url)
    async with open_store(url) as store:
        story = Story(store)
        await fill(story)
        await story.remove()
    async with open_store(url) as store:
        assert await store.get_run(story.run_key("r449")) is None
        assert await store.load_lane(story.key) == Lane(story.key, is_being_removed=True)
        assert await left(store) == 2
        assert await store.load_lane(story.key) == Lane(story.key)
        assert await store.get_deleted_run(story.run_key("r449")) is not None
    assert await is_sound(store_url)
