# ruff: noqa: S608 - the statements are constants
"""`check --repair` leaves a sound file after any damage, and says what it did."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from runlane_server.core.errors import StartError
from runlane_server.core.model import Corrupt, Message, RunKey, SessionKey
from runlane_server.store.base import EventFilter
from runlane_server.store.sqlite.check import check
from runlane_server.store.sqlite.repair import repair
from runlane_server.store.sqlite.store import SqliteStore
from store.planting import BAD, COPIES_DAMAGED, GOOD, fork, play, run_id
from support.asking import DAY, ask, question
from support.story import MANY, PLENTY, TENANT

pytestmark = pytest.mark.sqlite("damages the rows of a file")


async def transcript(store: SqliteStore, key: SessionKey) -> Sequence[Message]:
    return (await store.list_messages(key, limit=MANY, max_bytes=PLENTY)).items


REPLACED = {
    "message": (
        f"UPDATE messages SET parts = '[' WHERE run_id = '{BAD}-tools' AND role = 'assistant'",
        f"message tenant/{BAD}-tools-m1 was replaced",
    ),
    "event": (
        f"UPDATE run_events SET body = '[7]' WHERE run_id = '{BAD}-tools' AND kind = 'text_delta'",
        f"event tenant/{BAD}-tools/3 was replaced",
    ),
    "last_event": (
        f"UPDATE run_events SET kind = 'x' WHERE run_id = '{BAD}-ended' AND kind = 'run_complete'",
        f"event tenant/{BAD}-ended/3 was replaced",
    ),
    "terminal_event": (
        f"UPDATE events SET body = '{{}}' WHERE run_id = '{BAD}-ended'",
        f"terminal event of run tenant/{BAD}-ended was replaced",
    ),
}

REMOVED = {
    "session": f"UPDATE sessions SET title = x'00' WHERE session_id = '{BAD}'",
    "lane": f"UPDATE sessions SET version = -1 WHERE session_id = '{BAD}'",
    "run": f"UPDATE runs SET usage = '[' WHERE run_id = '{BAD}-ended'",
    "waiting_run": f"UPDATE runs SET state = 'dreaming' WHERE run_id = '{BAD}-waiting'",
    "prompt": f"UPDATE prompts SET rest = x'00' WHERE run_id = '{BAD}-ended'",
}


async def damaged(path: Path, statement: str) -> None:
    """Two sessions, of which one is damaged."""
    async with SqliteStore(path) as store:
        for session in (GOOD, BAD):
            await play(store, session)
    assert check(path).problems == ()
    with closing(sqlite3.connect(path)) as db, db:
        assert db.execute(statement).rowcount
    assert check(path).problems != ()


@pytest.mark.parametrize("kind", REPLACED)
async def test_damaged_record_is_replaced(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "runlane.db"
    statement, line = REPLACED[kind]
    await damaged(path, statement)
    assert line in await repair(path)
    assert check(path).problems == ()
    assert await repair(path) == []
    async with SqliteStore(path) as store:
        page = await store.list_messages(SessionKey(TENANT, BAD), limit=MANY, max_bytes=PLENTY)
        assert ("CORRUPT_RECORD" in str(page.items)) == (kind == "message")
        key = RunKey(TENANT, run_id(BAD, "tools"))
        events = await store.run_events(key, after=0, limit=MANY, max_bytes=PLENTY)
        assert any(isinstance(it.body, Corrupt) for it in events) == (kind == "event")
        log = await store.completes(TENANT, EventFilter(), after=0, limit=MANY, max_bytes=PLENTY)
        assert not any(it.complete.error for it in log.events)


@pytest.mark.parametrize("kind", REMOVED)
async def test_r21_damaged_session_is_removed_and_its_runs_end(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "runlane.db"
    await damaged(path, REMOVED[kind])
    assert await repair(path) == [f"session tenant/{BAD} was removed with its runs and messages"]
    assert check(path).problems == ()
    async with SqliteStore(path) as store:
        assert await store.get_session(SessionKey(TENANT, BAD)) is None
        assert await store.get_session(SessionKey(TENANT, GOOD)) is not None
        wanted = EventFilter(session_ids=frozenset({BAD}))
        log = await store.completes(TENANT, wanted, after=0, limit=MANY, max_bytes=PLENTY)
        ends = [it.complete.run_id for it in log.events]
        assert sorted(ends) == sorted(
            run_id(BAD, name) for name in ("ended", "tools", "folded", "active", "waiting")
        )


async def test_file_in_use_is_not_repaired(tmp_path: Path) -> None:
    path = tmp_path / "runlane.db"
    async with SqliteStore(path):
        with pytest.raises(StartError, match="in use by another server"):
            await repair(path)


COPIES = {
    **COPIES_DAMAGED,
    "attachment": "DELETE FROM copied_attachments WHERE turn = 1",
    "name": f"UPDATE copied_messages SET message_id = x'ff' WHERE run_id = '{BAD}-ended'",
}


@pytest.mark.parametrize("kind", COPIES)
async def test_damaged_message_of_a_copy_is_replaced_and_no_other(
    kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "runlane.db"
    async with SqliteStore(path) as store:
        story = await play(store, BAD)
        await ask(story, question(timeout=DAY))
        first, second = [await fork(story, name, 2) for name in ("first", "second")]
        before = await transcript(store, first)
    assert check(path).problems == ()
    with closing(sqlite3.connect(path)) as db, db:
        copy = "(SELECT copy_id FROM sessions WHERE session_id = 'first')"
        assert db.execute(f"{COPIES[kind]} AND copy_id = {copy}").rowcount
    assert check(path).problems != ()
    lines = await repair(path)
    assert all(("copy" in it or "copied" in it) and "replaced" in it for it in lines), lines
    assert check(path).problems == ()
    assert await repair(path) == []
    async with SqliteStore(path) as store:
        after = await transcript(store, first)
        assert await transcript(store, second) == before
    bad = [it for it in after if "CORRUPT_RECORD" in str(it)]
    assert [it.run_id for it in bad] == ([f"{BAD}-ended"] if kind != "name" else [])
    assert [it for it in before if it.run_id != f"{BAD}-ended"] == [
        it for it in after if it.run_id != f"{BAD}-ended"
    ]


async def test_repair_counts_questions_among_the_stored_bytes(tmp_path: Path) -> None:
    path = tmp_path / "runlane.db"
    async with SqliteStore(path) as store:
        await ask(await play(store, BAD), question(timeout=DAY))
    with closing(sqlite3.connect(path)) as db, db:
        assert db.execute(REPLACED["message"][0]).rowcount
    assert REPLACED["message"][1] in await repair(path)
    assert check(path).problems == ()


async def test_damaged_input_request_is_removed_with_its_session(tmp_path: Path) -> None:
    path = tmp_path / "runlane.db"
    async with SqliteStore(path) as store:
        await ask(await play(store, BAD), question(timeout=DAY))
    with closing(sqlite3.connect(path)) as db, db:
        assert db.execute("UPDATE input_requests SET question = '['").rowcount == 1
    assert check(path).problems != ()
    assert await repair(path) == [f"session tenant/{BAD} was removed with its runs and messages"]
    assert check(path).problems == ()
