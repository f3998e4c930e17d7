"""A damaged row of a SQLite file, of every kind in every column, harms no other session."""

# ruff: noqa: S608 - all names and values are constants of this file

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from runlane_server.store.base import EventFilter
from runlane_server.store.sqlite.store import SqliteStore
from store.planting import BAD, GOOD, completes, lists, play, view

TABLES = ("sessions", "runs", "prompts", "attachments", "messages", "run_events", "events")

DEEP = "[" * 100_000
HUGE = "x" * (5 << 20)

VALUES = {
    "bytes": "CAST(x'fffe41' AS TEXT)",
    "blob": "x'00ff'",
    "word": "'word'",
    "empty": "''",
    "negative": "-1",
    "largest": "9223372036854775807",
    "beyond_32_bits": "4294967296",
    "fraction": "1.5",
    "null": "NULL",
    "object": "'{}'",
    "numbers": "'[1,2]'",
    "unknown_part": '\'[["video","x"]]\'',
    "wrong_part": "'[[\"text\",5]]'",
    "lone_surrogate": '\'[["text","\\ud800"]]\'',
    "bad_label": "'{\"a\":1}'",
    "deep": f"'{DEEP}'",
    "huge": f"'{HUGE}'",
}
"""A value of each kind of damage, as SQL."""


def columns(db: sqlite3.Connection, table: str) -> list[str]:
    return [row[1] for row in db.execute(f"PRAGMA table_info({table})")]


def damages(db: sqlite3.Connection, table: str) -> Iterator[tuple[str, str]]:
    """Damages the rows of the bad session, one column and kind at a time, and repairs them."""
    names = columns(db, table)
    owner = "session_id" if "session_id" in names else "run_id"
    where = f"WHERE {owner} GLOB '{BAD}*'"
    kept = db.execute(f"SELECT {', '.join(names)} FROM {table} {where}").fetchall()
    marks = ", ".join("?" * len(names))
    for column in names:
        for kind, value in VALUES.items():
            if not _plant(db, f"UPDATE OR IGNORE {table} SET {column} = {value} {where}"):
                continue
            yield column, kind
            db.execute("BEGIN IMMEDIATE")
            good = f"{owner} GLOB '{GOOD}*'"
            if column == owner:
                db.execute(f"DELETE FROM {table} WHERE NOT ({good})")
            else:
                db.execute(f"DELETE FROM {table} {where}")
            db.executemany(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks})", kept)
            db.execute("COMMIT")


def _plant(db: sqlite3.Connection, update: str) -> bool:
    """Whether the table takes that value."""
    try:
        return db.execute(update).rowcount > 0
    except sqlite3.IntegrityError:  # a key that is a number
        return False


@pytest.mark.parametrize("table", TABLES)
async def test_damaged_row_harms_no_other_session(table: str, tmp_path: Path) -> None:
    path = tmp_path / "runlane.db"
    async with SqliteStore(path) as store:
        await play(store, GOOD)
        await play(store, BAD)
        good, bad, shared = await view(store, GOOD), await view(store, BAD), await lists(store)
        tried = 0
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("PRAGMA synchronous = OFF")
            for damage in damages(db, table):
                tried += 1
                assert await view(store, GOOD) == good, damage
                found = await lists(store)
                for name, items in shared.items():
                    mine = [it for it in items if GOOD in str(it)]
                    assert [it for it in found[name] if GOOD in str(it)] == mine, (damage, name)
                # Any answer about the damaged session can be sent.
                await view(store, BAD)
        assert await view(store, BAD) == bad
        assert await lists(store) == shared
        assert tried > len(VALUES)


async def test_compaction_removes_damaged_events_and_the_store_stays_writable(
    tmp_path: Path,
) -> None:
    original = tmp_path / "original.db"
    async with SqliteStore(original) as store:
        await play(store, BAD)
        await play(store, GOOD)
    data = original.read_bytes()
    with closing(sqlite3.connect(original)) as db:
        names = columns(db, "events")
    # The position is the order of the log itself.
    for column in set(names) - {"position"}:
        for kind in ("bytes", "blob", "word", "negative", "largest", "fraction"):
            path = tmp_path / f"{column}-{kind}.db"
            path.write_bytes(data)
            with closing(sqlite3.connect(path, isolation_level=None)) as db:
                where = f"WHERE session_id = '{BAD}'"
                if not _plant(db, f"UPDATE OR IGNORE events SET {column} = {VALUES[kind]} {where}"):
                    continue
            async with SqliteStore(path) as store:
                await store.compact(1 << 62, 1_000)
                assert store.failed is None, (column, kind)
                await play(store, "later")
                assert len(await completes(store, EventFilter())) == 3, (column, kind)
