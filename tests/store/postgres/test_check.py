"""`check` reads every row of a PostgreSQL database, and names those that cannot be read."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

import pytest

from runlane_server.cli import maintenance
from runlane_server.core.errors import StartError
from runlane_server.store.open import StoreUrl
from store.planting import BAD, GOOD, play
from support.postgres import postgres_store

if TYPE_CHECKING:
    from support.postgres import Connection

BROKEN = {
    "session tenant/bad cannot be read: Unsound: created_at: -1 is out of range": (
        "UPDATE sessions SET created_at = -1 WHERE session_id = 'bad'"
    ),
    "session tenant/bad cannot be read: ValueError: 'never' is not a valid WhenBusy": (
        "UPDATE runs SET when_busy = 'never' WHERE run_id = 'bad-waiting'"
    ),
    "run tenant/bad-ended cannot be read: JSONDecodeError: .*": (
        "UPDATE runs SET metadata = '[' WHERE run_id = 'bad-ended'"
    ),
    "message tenant/.* cannot be read: ValueError: unknown message part 'video'": (
        "UPDATE messages SET parts = '[[\"video\"]]' WHERE run_id = 'bad-ended' AND ordinal > 0"
    ),
    "event tenant/bad-active/[0-9]+ cannot be read: KeyError: 'dream'": (
        "UPDATE run_events SET kind = 'dream' WHERE run_id = 'bad-active' AND kind = 'started'"
    ),
    "terminal event of run tenant/bad-ended cannot be read: ValueError: .* another run .*": (
        "UPDATE events SET session_id = 'good' WHERE run_id = 'bad-ended'"
    ),
}

INCONSISTENT = {
    "lanes: session tenant/bad names the active run '' instead of 'bad-active'": (
        "UPDATE sessions SET active_run_id = '' WHERE session_id = 'bad'"
    ),
    "lanes: session tenant/bad counts 9 waiting runs instead of 1": (
        "UPDATE sessions SET waiting_runs = 9, active_run_id = 'bad-active'"
        " WHERE session_id = 'bad'"
    ),
    "lanes: session tenant/bad has 2 active runs": (
        "UPDATE runs SET state = 'active' WHERE run_id = 'bad-waiting'"
    ),
    "waiting: run tenant/bad-waiting is accepted at place 1 of its lane, with the active run .*": (
        "UPDATE runs SET state = 'accepted' WHERE run_id = 'bad-waiting'"
    ),
    "runs: run tenant/bad-ended is active, but has an end": (
        "UPDATE runs SET state = 'active' WHERE run_id = 'bad-ended'"
    ),
    "runs: run tenant/bad-ended has accept_seq 77; that of its session is .*": (
        "UPDATE runs SET accept_seq = 77, state = 'completed' WHERE run_id = 'bad-ended'"
    ),
    "accept_order: run tenant/.* has accept_seq .* after 77": "SELECT 1",
    "messages: message tenant/.* is in turn 1; its run is in 0": (
        "UPDATE runs SET turn = 0 WHERE run_id = 'bad-ended'"
    ),
    "run_ends: run tenant/bad-ended has no events": (
        "DELETE FROM run_events WHERE run_id = 'bad-ended'"
    ),
    "folds: run tenant/bad-ended is folded into bad-active, but has turn 0 instead of .*": (
        "UPDATE runs SET folded_into = 'bad-active' WHERE run_id = 'bad-ended'"
    ),
    "copies: session tenant/bad began with 2 turns of its origin, but has 0": (
        "UPDATE sessions SET copy_id = 7, origin_id = 's', origin_turn = 2 WHERE session_id = 'bad'"
    ),
    "terminal_events: .* belongs to run tenant/bad-ended, which has not ended": (
        "UPDATE runs SET ended_at = NULL WHERE run_id = 'bad-ended'"
    ),
}


async def checked(url: str) -> tuple[list[str], int]:
    """The lines that the command prints, and its exit code."""
    lines, code = await asyncio.to_thread(maintenance.check, StoreUrl.parse(url))
    return list(lines), code


async def test_sound_database_passes_and_each_damage_is_named(
    postgres_url: str, beside: Connection
) -> None:
    async with postgres_store(postgres_url) as store:
        await play(store, GOOD)
        await play(store, BAD)
        lines, code = await checked(postgres_url)
        assert code == 0, lines
        assert "no problems in 2 sessions, 10 runs, 6 terminal events" in lines[0]
        for line, damage in BROKEN.items():
            assert await beside.execute(damage) != "UPDATE 0"
            lines, code = await checked(postgres_url)
            assert code == 1
            assert [it for it in lines if re.fullmatch(f"records: {line}", it)], (line, lines)


async def test_database_without_a_store_is_refused(postgres_url: str) -> None:
    with pytest.raises(StartError, match="has no store"):
        await checked(postgres_url)


async def test_each_inconsistency_is_named(postgres_url: str, beside: Connection) -> None:
    async with postgres_store(postgres_url) as store:
        await play(store, GOOD)
        await play(store, BAD)
        for line, damage in INCONSISTENT.items():
            assert await beside.execute(damage) != "UPDATE 0"
            lines, code = await checked(postgres_url)
            assert code == 1
            assert [it for it in lines if re.fullmatch(line, it)], (line, lines)
            assert not any("good" in it for it in lines)
