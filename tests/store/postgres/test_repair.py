"""`check --repair` over PostgreSQL: what cannot be read is replaced or removed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from runlane_server.cli import maintenance
from runlane_server.core.errors import StartError
from runlane_server.core.model import Attachment, SessionKey
from runlane_server.store.base import EventFilter
from runlane_server.store.open import StoreUrl
from runlane_server.store.postgres.schema import SQL
from store.planting import BAD, COPIES_DAMAGED, GOOD, fork, play
from support.asking import DAY, ask, question
from support.postgres import postgres_store
from support.story import MANY, PLENTY, TENANT, Story, request

if TYPE_CHECKING:
    from support.postgres import Connection

DAMAGED = (
    "UPDATE messages SET parts = '[[\"video\"]]' WHERE run_id = 'bad-ended' AND role = 'assistant'",
    "UPDATE run_events SET kind = 'dream' WHERE run_id = 'bad-active' AND kind = 'started'",
    "UPDATE run_events SET kind = 'dream' WHERE run_id = 'bad-ended' AND kind = 'run_complete'",
    "UPDATE events SET body = '{}' WHERE run_id = 'bad-ended'",
    "UPDATE runs SET when_busy = 'never' WHERE run_id = 'good-waiting'",
)


async def repaired(url: str) -> tuple[list[str], int]:
    """The lines that the command prints, and its exit code."""
    lines, code = await asyncio.to_thread(maintenance.repair, StoreUrl.parse(url), None)
    return list(lines), code


async def test_damaged_records_are_replaced_or_removed(
    postgres_url: str, beside: Connection
) -> None:
    async with postgres_store(postgres_url) as store:
        for session in (GOOD, BAD):
            await play(store, session)
    for damage in DAMAGED:
        assert await beside.execute(damage) != "UPDATE 0"
    lines, code = await repaired(postgres_url)
    assert code == 0, lines
    assert sorted(lines[:-1]) == [
        "event tenant/bad-active/2 was replaced",
        "event tenant/bad-ended/3 was replaced",
        "message tenant/bad-ended-m1 was replaced",
        "session tenant/good was removed with its runs and messages",
        "terminal event of run tenant/bad-ended was replaced",
    ]
    lines, code = await repaired(postgres_url)
    assert (lines[0], code) == ("nothing to repair", 0)
    async with postgres_store(postgres_url) as store:
        page = await store.list_messages(SessionKey(TENANT, BAD), limit=MANY, max_bytes=PLENTY)
        assert "CORRUPT_RECORD" in str(page.items)
        assert await store.get_session(SessionKey(TENANT, GOOD)) is None
        log = await store.completes(TENANT, EventFilter(), after=0, limit=MANY, max_bytes=PLENTY)
        ends = [it.complete for it in log.events]
        assert sorted(it.run_id for it in ends if it.error) == ["good-active", "good-waiting"]


COPIES = {
    **COPIES_DAMAGED,
    "attachment": "UPDATE copied_attachments SET content = '\\xff' WHERE is_text",
}


async def recorded(beside: Connection) -> dict[str, int]:
    rows = await beside.fetch("SELECT session_id, stored_bytes FROM sessions")
    return {row["session_id"]: row["stored_bytes"] for row in rows}


@pytest.mark.parametrize("kind", COPIES)
async def test_damaged_message_of_a_copy_is_named_and_replaced(
    postgres_url: str, beside: Connection, kind: str
) -> None:
    async with postgres_store(postgres_url) as store:
        story = await play(store, BAD)
        first, second = [await fork(story, name, 2) for name in ("first", "second")]
        before = await store.list_messages(first, limit=MANY, max_bytes=PLENTY)
    intact = await recorded(beside)
    copy_id = await beside.fetchval("SELECT copy_id FROM sessions WHERE session_id = 'first'")
    damage = f"{COPIES[kind]} AND copy_id = {copy_id}"
    assert await beside.execute(damage) == "UPDATE 1"
    async with postgres_store(postgres_url) as store:
        read = await store.list_messages(first, limit=MANY, max_bytes=PLENTY)
    name = "m0" if kind in {"prompt", "attachment"} else "m1"
    found, code = await asyncio.to_thread(maintenance.check, StoreUrl.parse(postgres_url))
    message = f"message copy {copy_id}/bad-ended-{name}"
    assert (code, found[0].startswith(f"records: {message} cannot be read")) == (1, True), found
    lines, code = await repaired(postgres_url)
    assert lines[:-1] == [f"{message} was replaced"]
    assert (await repaired(postgres_url))[0][0] == "nothing to repair"
    async with postgres_store(postgres_url) as store:
        mended = await store.list_messages(first, limit=MANY, max_bytes=PLENTY)
        # What callers got for it before.
        assert [it.parts for it in mended.items] == [it.parts for it in read.items]
        assert await store.list_messages(second, limit=MANY, max_bytes=PLENTY) == before
    after = await recorded(beside)
    changed = await beside.fetchval(
        "SELECT coalesce(sum(octet_length(content)), 0) + ("
        " SELECT sum(200 + coalesce(octet_length(parts), 0) + coalesce(octet_length(prompt), 0))"
        " FROM copied_messages WHERE copy_id = $1) FROM copied_attachments WHERE copy_id = $1",
        copy_id,
    )
    assert after.pop("first") == changed + len('title{"a":"b"}')
    del intact["first"]
    assert after == intact


async def test_recount_of_sound_sessions_changes_only_how_labels_count(
    postgres_url: str, beside: Connection
) -> None:
    async with postgres_store(postgres_url) as store:
        await ask(await play(store, GOOD), question(timeout=DAY))
        story = Story(store, BAD)
        await story.play(request("r", "p" * 3_000, Attachment("n", "text/plain", "t" * 99)), "said")
        await fork(story, "fork", 1)
    before = await recorded(beside)
    for session_id in before:
        await beside.execute(SQL["recount_stored_bytes"], TENANT, session_id)
    after = await recorded(beside)
    labels = {GOOD: len('{"color":"red"}') - len("colorred"), BAD: 0, "fork": len('{"":""}')}
    assert after == {name: size + labels[name] for name, size in before.items()}


async def test_repair_copies_no_database(postgres_url: str, tmp_path: Path) -> None:
    with pytest.raises(StartError, match="pg_dump"):
        maintenance.repair(StoreUrl.parse(postgres_url), tmp_path / "copy.db")
