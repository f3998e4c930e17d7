"""`check --repair` over PostgreSQL: what cannot be read is replaced or removed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from runlane_server.cli import maintenance
from runlane_server.core.errors import StartError
from runlane_server.core.model import SessionKey
from runlane_server.store.base import EventFilter
from runlane_server.store.open import StoreUrl
from store.planting import BAD, GOOD, play
from support.postgres import postgres_store
from support.story import MANY, PLENTY, TENANT

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


async def test_repair_copies_no_database(postgres_url: str, tmp_path: Path) -> None:
    with pytest.raises(StartError, match="pg_dump"):
        maintenance.repair(StoreUrl.parse(postgres_url), tmp_path / "copy.db")
