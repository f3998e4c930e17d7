"""Retention: terminal events with the events of their runs, and stale sessions."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from runlane_server.core.errors import CursorCompacted
from runlane_server.core.model import RunComplete, RunKey, SessionKey, TextDelta
from runlane_server.store.base import EventFilter, IdleSession, NewSession, Store
from runlane_server.store.memory.store import MemoryStore
from runlane_server.store.sqlfiles import migrations
from runlane_server.store.sqlite import compact as sqlite_compact
from runlane_server.store.sqlite.store import SqliteStore
from support.story import MANY, PLENTY, START, TENANT, Story

FAR = 1 << 62
"""After all ends."""


async def indices(story: Story, run_id: str, after: int = 0) -> list[int]:
    """The events of a run that are left."""
    found = await story.store.run_events(
        story.run_key(run_id), after=after, limit=MANY, max_bytes=PLENTY
    )
    return [event.index for event in found]


async def chatty(story: Story, run_id: str, deltas: int = 3) -> RunComplete:
    """A run with some events: `deltas`, and three more."""
    await story.accept(run_id)
    await story.start()
    await story.append(*(TextDelta(f"{n} ") for n in range(deltas)))
    return await story.finish()


async def positions(store: Store, tenant: str = TENANT) -> list[int]:
    """The remaining log of a tenant."""
    page = await store.completes(
        tenant, EventFilter(), after=store.compacted_of(tenant), limit=MANY, max_bytes=PLENTY
    )
    return [event.position for event in page.events]


# --- By size ------------------------------------------------------------------------------------


async def test_log_knows_its_size(store: Store, story: Story) -> None:
    assert await store.log_bytes() == 0
    await story.accept("open")
    assert await store.log_bytes() == 0  # what has not ended does not count
    await Story(store, "other").play("small")
    small = await store.log_bytes()
    assert small > 0
    await story.start()
    await story.append(TextDelta("x" * 10_000))
    await story.finish("y" * 20_000)
    both = await store.log_bytes()
    assert small + 30_000 < both < small + 40_000
    assert await store.compact(0, 1, keep_bytes=0) == 1
    assert await store.log_bytes() == both - small
    assert await store.compact(0, 9, keep_bytes=0) == 1
    assert await store.log_bytes() == 0
    await Story(store, "other").store.compact(0, 9, keep_bytes=0)
    await Story(store, "next").play("next")
    assert 0 < await store.log_bytes() < both


async def test_oldest_go_until_the_rest_fits(store: Store, story: Story) -> None:
    for n in range(6):
        await story.play(f"r{n}")
    size = await store.log_bytes()
    assert await store.compact(0, 9, keep_bytes=size) == 0
    assert await store.compact(0, 9, keep_bytes=size - 1) == 1
    assert await store.compact(0, 9, keep_bytes=size // 2) == 2
    assert await positions(store) == [4, 5, 6]
    assert await store.log_bytes() <= size // 2
    assert await store.compact(0, 2, keep_bytes=0) == 2
    assert await positions(store) == [6]


async def test_age_and_size_both_hold(store: Store, story: Story) -> None:
    ends = [await story.play(f"r{n}") for n in range(6)]
    size = await store.log_bytes()
    assert await store.compact(ends[1].ended_at, 9, keep_bytes=size) == 1  # the age
    assert await store.compact(ends[1].ended_at, 9, keep_bytes=size // 2) == 2  # the size
    assert await store.compact(ends[4].ended_at, 9, keep_bytes=size // 2) == 1
    assert await positions(store) == [5, 6]


# --- Of several tenants -------------------------------------------------------------------------


async def test_r25_tenant_with_a_large_log_removes_no_event_of_others(store: Store) -> None:
    quiet, busy = Story(store, tenant="quiet"), Story(store, tenant="busy")
    await quiet.play("q1")  # position 1
    alone = await store.log_bytes()
    for n in range(6):
        await busy.play(f"b{n}")  # 2 to 7
    await quiet.play("q2")  # 8
    await busy.play("b6")  # 9
    keep = await store.log_bytes() - alone
    assert 1 <= await store.compact(0, 99, keep_bytes=keep) <= 2
    assert await store.log_bytes() <= keep
    assert await positions(store, "quiet") == [1, 8]
    # An equal share has room for both events of the quiet tenant.
    assert await store.compact(0, 99, keep_bytes=5 * alone) >= 2
    assert await store.log_bytes() <= 5 * alone
    assert await positions(store, "quiet") == [1, 8]
    left = await positions(store, "busy")
    assert left in ([7, 9], [6, 7, 9])
    assert (store.compacted_of("quiet"), store.compacted_of("busy")) == (0, left[0] - 1)
    assert (store.compacted, store.position) == (left[0] - 1, 9)


async def test_positions_go_on_after_a_removed_last_event(store: Store) -> None:
    quiet, busy = Story(store, tenant="quiet"), Story(store, tenant="busy")
    await quiet.play("q")
    kept = 2 * await store.log_bytes() + 100
    await chatty(busy, "large", deltas=200)
    assert await store.compact(0, 9, keep_bytes=kept) == 1
    assert (await positions(store, "quiet"), await positions(store, "busy")) == ([1], [])
    assert (store.compacted_of("busy"), store.compacted_of("quiet"), store.position) == (2, 0, 2)
    await busy.play("n")
    assert await positions(store, "busy") == [3]
    assert await store.compact(0, 9, keep_bytes=kept) == 0
    assert await store.compact(FAR, 9) == 2
    assert await store.log_bytes() == 0
    assert (store.compacted_of("quiet"), store.compacted_of("busy")) == (1, 3)


async def test_size_of_a_log_that_begins_again_counts_from_nothing(store: Store) -> None:
    quiet, busy = Story(store, tenant="quiet"), Story(store, tenant="busy")
    await busy.play("first")
    once = await store.log_bytes()
    assert await store.compact(FAR, 9) == 1
    await quiet.play("other")
    await busy.play("again")
    assert await store.log_bytes() == pytest.approx(2 * once, rel=0.1)


async def test_age_removes_the_events_of_all_tenants(store: Store) -> None:
    stories = [Story(store, tenant=f"t{n % 3}", session_id=f"s{n}") for n in range(6)]
    for story in stories:
        await story.play(f"r{story.session_id}")
    assert await store.compact(FAR, 4) == 4
    assert [store.compacted_of(f"t{n}") for n in range(3)] == [4, 2, 3]
    assert [await positions(store, f"t{n}") for n in range(3)] == [[], [5], [6]]


# --- The events of a run ------------------------------------------------------------------------


async def test_read_of_compacted_events_raises_cursor_compacted(store: Store, story: Story) -> None:
    complete = await chatty(story, "a")
    await chatty(story, "b")
    assert await store.compact(0, 1, keep_bytes=0) == 1
    for after in (0, 1, 4):
        with pytest.raises(CursorCompacted, match="GetRun"):
            await indices(story, "a", after)
    assert await indices(story, "a", 5) == [6]  # who knows all but the last still gets that
    assert await indices(story, "a", 6) == []
    assert await indices(story, "a", 99) == []
    assert await indices(story, "b") == [1, 2, 3, 4, 5, 6]
    run = await store.get_run(story.run_key("a"))
    assert run is not None
    assert run.complete == complete
    messages = await store.list_messages(story.key, limit=MANY, max_bytes=PLENTY)
    assert len(messages.items) == 4


async def test_run_that_has_the_id_of_a_removed_one_keeps_its_events(
    store: Store, story: Story
) -> None:
    await chatty(story, "a")
    await story.remove()
    await store.forget_deleted(FAR, 9)
    await chatty(story, "a")
    assert await store.compact(0, 1, keep_bytes=0) == 1
    assert await indices(story, "a") == [1, 2, 3, 4, 5, 6]
    assert await store.position_of(story.run_key("a")) == 2
    await story.remove()
    await store.forget_deleted(FAR, 9)
    await story.accept("a")
    await story.start()
    assert await store.compact(FAR, 9) == 1
    assert await indices(story, "a") == [1, 2]
    await story.finish()
    assert await store.compact(FAR, 9) == 1
    assert await indices(story, "a", 2) == [3]


async def test_event_that_outlived_its_session_goes_too(store: Store, story: Story) -> None:
    await chatty(story, "a")
    await story.remove()
    assert await store.compact(FAR, 9) == 1
    assert await store.log_bytes() == 0


# --- In small steps -----------------------------------------------------------------------------


async def test_long_run_goes_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_compact, "STEP_ROWS", 10)
    async with SqliteStore(tmp_path / "runlane.db") as store:
        story = Story(store)
        await chatty(story, "a", deltas=32)
        await chatty(story, "b", deltas=2)
        seen = await _commits(store)
        assert await store.compact(FAR, 9) == 2
        # 34 events of the one, 4 of the other, and two terminal ones, by ten.
        assert seen == ["COMMIT"] * 4
        assert await indices(story, "a", 34) == [35]
        assert await indices(story, "b", 4) == [5]


async def test_large_events_go_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_compact, "STEP_BYTES", 10_000)
    async with SqliteStore(tmp_path / "runlane.db") as store:
        story = Story(store)
        await story.accept("a")
        await story.start()
        await story.append(*(TextDelta("x" * 6_000) for _ in range(6)))
        await story.finish("y" * 10_000)
        await story.play("b", "z" * 10_000)
        await story.play("c")
        seen = await _commits(store)
        assert await store.compact(FAR, 9) == 3
        assert 4 <= len(seen) <= 6
        assert await store.log_bytes() == 0


async def test_half_removed_run_says_so_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_compact, "STEP_ROWS", 10)
    async with SqliteStore(tmp_path / "runlane.db") as store:
        story = Story(store)
        await chatty(story, "a", deltas=32)
        step = asyncio.create_task(store.compact(FAR, 9))
        # A write is committed between two steps: it does not wait for the whole run.
        for n in itertools.count():
            await Story(store, f"other {n}").accept(f"b{n}")
            assert not step.done()
            try:
                await indices(story, "a")
            except CursorCompacted:
                break
        assert (await indices(story, "a", 34)) == [35]
        assert await step == 1


async def test_accepts_come_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_compact, "STEP_ROWS", 1)
    async with SqliteStore(tmp_path / "runlane.db") as store:
        story = Story(store)
        for n in range(30):
            await story.play(f"r{n}")
        compaction = asyncio.create_task(store.compact(FAR, 30))
        for n in range(10):
            await Story(store, f"s{n}").accept(f"a{n}")
            assert not compaction.done()
        assert await compaction == 30


async def _commits(store: SqliteStore) -> list[str]:
    seen: list[str] = []
    assert store._open is not None
    await store._open.writer.set_trace_callback(
        lambda sql: seen.append(sql) if sql == "COMMIT" else None
    )
    return seen


async def test_size_is_known_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "runlane.db"
    async with SqliteStore(path) as store:
        story = Story(store)
        for n in range(4):
            await story.play(f"r{n}")
        await store.compact(0, 1, keep_bytes=0)
        size = await store.log_bytes()
    async with SqliteStore(path) as store:
        assert await store.log_bytes() == size
        await store.compact(FAR, 9)
    async with SqliteStore(path) as store:
        assert await store.log_bytes() == 0
        story.store = store
        await story.play("next")
        assert await store.log_bytes() == pytest.approx(size / 3, rel=0.1)


# --- Stale sessions -----------------------------------------------------------------------------


async def test_stale_sessions_the_longest_untouched_first(store: Store) -> None:
    late, early, busy, waiting, other = (
        Story(store, "late"),
        Story(store, "early"),
        Story(store, "busy"),
        Story(store, "waiting"),
        Story(store, "other", tenant="another"),
    )
    early.now, other.now, late.now = START + 100, START + 200, START + 300
    await late.play("l")
    await early.play("e0")
    await early.play("e1")
    await other.play("o")
    await busy.accept("b")
    await busy.start()
    await waiting.accept("w")
    empty = NewSession(SessionKey(TENANT, "empty"), START + 150)
    await store.create_session(empty)

    assert await store.stale_sessions(FAR, 9) == [
        IdleSession(early.key, early.lane.version, 2),
        IdleSession(empty.key, 1, 0),
        IdleSession(other.key, other.lane.version, 1),
        IdleSession(late.key, late.lane.version, 1),
    ]
    assert [it.key for it in await store.stale_sessions(FAR, 2)] == [early.key, empty.key]
    assert [it.key for it in await store.stale_sessions(early.now + 1, 9)] == [early.key]
    assert await store.stale_sessions(early.now, 9) == []
    await busy.finish()
    assert [it.key for it in await store.stale_sessions(FAR, 1)] == [busy.key]
    await busy.remove()
    assert busy.key not in [it.key for it in await store.stale_sessions(FAR, 9)]


# --- The schema ---------------------------------------------------------------------------------


async def test_file_of_the_first_schema_is_brought_up_to_date(tmp_path: Path) -> None:
    """As if all that was written since was written by the newer schema."""
    path, old = tmp_path / "runlane.db", tmp_path / "old.db"
    async with SqliteStore(path) as store:
        story = Story(store)
        for n in range(4):
            await chatty(story, f"r{n}", deltas=n + 1)
        await store.compact(0, 1, keep_bytes=0)
        await story.accept("open")
        await story.start()
        other = Story(store, tenant="other")
        await other.play("other")
        size = await store.log_bytes()
    _take_back(path, old)
    async with SqliteStore(old) as store:
        assert await store.log_bytes() == size
        assert (store.position, store.compacted) == (5, 1)
        # The first schema had one position for all tenants.
        assert store.compacted_of("other") == store.compacted_of("nobody") == 1
        story = replace(story, store=store)
        story.lane = await store.load_lane(story.key)
        assert await indices(story, "r0", 3) == [4]
        assert await indices(story, "r3") == [1, 2, 3, 4, 5, 6, 7]
        assert await indices(story, "open") == [1, 2]
        await story.finish()
        assert await positions(store) == [2, 3, 4, 6]
        assert len(await store.stale_sessions(FAR, 9)) == 2
        assert 0 < await store.compact(0, 9, keep_bytes=size // 2) < 4
        assert await positions(store, "other") == [5]


def _take_back(new: Path, old: Path) -> None:
    """Writes what is in a file with the newest schema to one with the first."""
    with closing(sqlite3.connect(old, isolation_level=None)) as db:
        db.executescript(migrations("sqlite")[0].sql)
        db.execute("PRAGMA application_id = 1383427692")
        db.execute("PRAGMA user_version = 1")
        db.execute("DELETE FROM meta")
        db.execute("ATTACH ? AS new", [str(new)])
        for (table,) in db.execute("SELECT name FROM main.sqlite_master WHERE type = 'table'"):
            columns = [row[1] for row in db.execute(f"PRAGMA main.table_info({table})")]
            names = ", ".join(columns)
            db.execute(f"INSERT INTO main.{table} ({names}) SELECT {names} FROM new.{table}")  # noqa: S608
        # The first schema kept the events of runs for ever.
        db.execute(
            "INSERT INTO run_events SELECT tenant, run_id, 1, at, 'accepted', '[1]' FROM run_events"
            " WHERE run_id = 'r0'"
        )


async def test_memory_store_frees_removed_events() -> None:
    store = MemoryStore()
    story = Story(store)
    for n in range(3):
        await chatty(story, f"r{n}", deltas=50)
    await store.compact(FAR, 9)
    assert sum(len(run.events) for run in store._tables.runs.values()) == 3
    assert await store.log_bytes() == 0


@pytest.mark.parametrize("reads", ["run", "lane"])
async def test_refused_page_holds_no_later_read_at_its_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: str
) -> None:
    monkeypatch.setattr(sqlite_compact, "STEP_ROWS", 10)
    async with SqliteStore(tmp_path / "runlane.db") as store:
        story = Story(store)
        await chatty(story, "a", deltas=32)
        step = asyncio.create_task(store.compact(FAR, 9))
        refused = None
        for n in itertools.count():
            await Story(store, f"other {n}").accept(f"b{n}")
            assert not step.done()
            try:
                if reads == "run":
                    await store.run_events(story.run_key("a"), after=0, limit=9, max_bytes=1)
                else:
                    await store.lane_events(story.key, after=0, limit=9, max_bytes=1)
            except CursorCompacted as error:
                # As a caller may: the error holds the frames that it passed through.
                refused = error
                break
        assert refused is not None
        await Story(store, "later").accept("c")
        assert await store.get_run(RunKey(story.tenant, "c")) is not None
        assert await step == 1
