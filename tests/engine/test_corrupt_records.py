"""A node over a store with damaged rows: only their own session is affected."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from runlane_server.access.caller import DEFAULT_TENANT
from runlane_server.core.errors import CorruptRecord, RunNotFound, SessionExists, SessionNotFound
from runlane_server.core.limits import Limits
from runlane_server.core.model import Prompt, RunRequest, RunState, SessionKey
from runlane_server.core.transition import Receipt
from runlane_server.engine.cancel_all import CancelledPage
from runlane_server.store.base import EventFilter
from runlane_server.store.sqlite.check import check
from runlane_server.store.sqlite.store import SqliteStore
from support.node import Node, running
from support.staging import SECONDS, say, script

DAMAGES = {
    "bytes": "UPDATE runs SET cancel_reason = CAST(x'fffe' AS TEXT) WHERE run_id = 'bad-active'",
    "blob": "UPDATE runs SET state = x'00' WHERE run_id = 'bad-waiting'",
    "unknown_state": "UPDATE runs SET state = 'dreaming' WHERE session_id = 'bad'",
    "range": "UPDATE sessions SET version = -1 WHERE session_id = 'bad'",
    "type": "UPDATE sessions SET accept_seq = 'word' WHERE session_id = 'bad'",
}


def damage(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        for statement in statements:
            assert db.execute(statement).rowcount


async def leave_work(path: Path) -> None:
    """A store in which two sessions have an active run and a waiting one."""
    async with SqliteStore(path) as store, running(store) as node:
        for name in ("bad", "good"):
            await node.start_blocked(name, name, run_id=f"{name}-active", max_attempts=2)
            await node.queue(name, "later", run_id=f"{name}-waiting")
        # As if the process was killed: the runs stay active in the copy.
        with closing(sqlite3.connect(path)) as db:
            db.execute("VACUUM INTO ?", [str(path.with_suffix(".copy"))])
        for name in ("bad", "good"):
            await node.coordinator.cancel(name)
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    path.with_suffix(".copy").rename(path)


@pytest.mark.parametrize("kind", DAMAGES)
async def test_r21_damaged_lane_stops_only_its_session_and_can_be_deleted(
    kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "runlane.db"
    await leave_work(path)
    damage(path, DAMAGES[kind])
    assert any(line.startswith("records: ") and "bad" in line for line in check(path).problems)
    async with SqliteStore(path) as store, running(store) as node:
        # The other session is recovered, and works.
        await node.latches.reached("good")
        node.latches.open("good")
        assert (await node.end("good-active")).state is RunState.COMPLETED
        assert (await node.end("good-waiting")).state is RunState.COMPLETED

        with pytest.raises(CorruptRecord, match="bad"):
            await node.queue("bad", "more")
        with pytest.raises(CorruptRecord, match="bad"):
            await node.coordinator.cancel("bad")
        receipts = await node.coordinator.cancel_all()
        assert receipts == (Receipt("bad", unreadable=True),)
        page = await node.coordinator.cancel_page(after="", max_runs=9)
        assert page == CancelledPage(receipts, "")

        await node.coordinator.sessions.delete("bad")
        assert await _ends(node, "bad") == {"bad-active": 1, "bad-waiting": 1}
        with pytest.raises(SessionNotFound):
            await node.coordinator.sessions.delete("bad")
        with pytest.raises(RunNotFound):
            await node.coordinator.get_run("bad-active")
        await node.accept("bad", "again", run_id="fresh")
        assert (await node.end("fresh")).state.is_terminal
    assert check(path).problems == ()


@pytest.mark.parametrize("notices", ["cancel", "end"])
async def test_r21_active_run_of_a_damaged_lane_gives_its_slot_back(
    notices: str, tmp_path: Path
) -> None:
    path = tmp_path / "runlane.db"
    limits = Limits(max_active_runs=1, cancel_grace=SECONDS)
    async with SqliteStore(path) as store, running(store, limits=limits) as node:
        await node.start_blocked("bad", "g", run_id="r")
        waiting = await node.queue("good", "x")
        damage(path, DAMAGES["range"])
        if notices == "cancel":
            with pytest.raises(CorruptRecord, match="bad"):
                await node.coordinator.cancel("bad")
        else:
            node.latches.open("g")
        # There is one slot, which the run had.
        assert (await node.end(waiting.run_id)).state is RunState.COMPLETED
        await node.coordinator.sessions.delete("bad")
        assert await _ends(node, "bad") == {"r": 1}
        again = await node.queue("bad", "x")
        assert (await node.end(again.run_id)).state is RunState.COMPLETED
    assert check(path).problems == ()


@pytest.mark.parametrize("name", DAMAGES)
async def test_r03_id_of_a_damaged_session_is_taken(name: str, tmp_path: Path) -> None:
    path = tmp_path / "runlane.db"
    await leave_work(path)
    damage(path, DAMAGES[name])
    async with SqliteStore(path) as store, running(store) as node:
        with pytest.raises(SessionExists, match="bad"):
            await node.coordinator.sessions.create("bad")
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE sessions SET created_at = 'word' WHERE session_id = 'bad'")
        node.latches.open("good")
        await node.end("good-waiting")
        with pytest.raises(SessionExists, match="bad"):
            await node.coordinator.sessions.fork("good", "bad")


@pytest.mark.parametrize("remedy", ["nothing", "repair", "delete"])
async def test_an_accept_outlives_the_dropped_lane_of_its_session(
    remedy: str, tmp_path: Path
) -> None:
    path = tmp_path / "runlane.db"
    limits = Limits(max_active_runs=1, cancel_grace=SECONDS)
    async with SqliteStore(path) as store, running(store, limits=limits) as node:
        await node.start_blocked("bad", "g", run_id="r")
        waiting = await node.queue("good", "x")
        accepted = node.coordinator.begin_accepted("bad")
        await node.coordinator._lanes.wait_settled()
        negated = "UPDATE sessions SET version = -version WHERE session_id = 'bad'"
        damage(path, negated)
        with pytest.raises(CorruptRecord, match="bad"):
            await node.coordinator.cancel("bad")
        # The lane is dropped: its slot is free.
        assert (await node.end(waiting.run_id)).state is RunState.COMPLETED
        request = RunRequest(accepted.run_id, Prompt(script(say("x"))))
        if remedy == "nothing":
            with pytest.raises(CorruptRecord, match="bad"):
                await node.coordinator.run_accepted(accepted, request, allow_missing=True)
            return
        if remedy == "repair":
            damage(path, negated)
        else:
            await node.coordinator.sessions.delete("bad")
        await node.coordinator.run_accepted(accepted, request, allow_missing=True)
        if remedy == "repair":  # behind the run that has lost its agent
            assert (await node.state(accepted.run_id)) is RunState.QUEUED
        else:
            assert (await node.end(accepted.run_id)).state is RunState.COMPLETED


async def _ends(node: Node, session_id: str) -> dict[str, int]:
    """The number of placeholders of terminal events, by run id."""
    wanted = EventFilter(session_ids=frozenset({session_id}))
    page = await node.store.completes(DEFAULT_TENANT, wanted, after=0, limit=100, max_bytes=1 << 20)
    found: Sequence[str] = [
        event.complete.run_id
        for event in page.events
        if event.complete.error is not None and event.complete.error.reason == "CORRUPT_RECORD"
    ]
    return {run_id: found.count(run_id) for run_id in found}


async def test_r21_subscriber_gets_a_placeholder_for_a_damaged_event(tmp_path: Path) -> None:
    path = tmp_path / "runlane.db"
    async with SqliteStore(path) as store, running(store) as node:
        for n in range(3):
            await node.end((await node.queue("s", "x", run_id=f"r{n}")).run_id)
    damage(path, "UPDATE events SET body = '{\"usage\":[1.5]}' WHERE run_id = 'r1'")
    async with SqliteStore(path) as store, running(store) as node:
        subscription = node.feed.subscribe(DEFAULT_TENANT, EventFilter(), 0)
        page = await subscription.next(SECONDS)
        subscription.close()
        completes = [event.complete for event in page.events]
        assert [it.run_id for it in completes] == ["r0", "r1", "r2"]
        assert [it.error and it.error.reason for it in completes] == [None, "CORRUPT_RECORD", None]
        # The run itself is not damaged.
        assert (await node.state("r1")) is RunState.COMPLETED


async def test_damaged_prompt_fails_its_run_only(tmp_path: Path) -> None:
    path = tmp_path / "runlane.db"
    await leave_work(path)
    damage(path, "UPDATE runs SET prompt_head = x'ff' WHERE run_id = 'bad-waiting'")
    async with SqliteStore(path) as store, running(store) as node:
        for name in ("bad", "good"):
            await node.latches.reached(name)
            node.latches.open(name)
        assert (await node.end("good-waiting")).state is RunState.COMPLETED
        await store.load_lane(SessionKey(DEFAULT_TENANT, "bad"))
        failed = await node.end("bad-waiting")
        assert failed.error is not None
        assert failed.error.reason == "CORRUPT_RECORD"
        ended = [it for it in await node.completes() if it.run_id == "bad-waiting"]
        assert [it.error and it.error.reason for it in ended] == ["CORRUPT_RECORD"]
