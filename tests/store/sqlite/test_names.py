# ruff: noqa: S608 - the statements are constants
"""Names that are not UTF-8 are found, printed and replaced, in every column."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from runlane_server.core.model import RunKey, SessionKey
from runlane_server.store.sqlite.check import check
from runlane_server.store.sqlite.names import COLUMNS
from runlane_server.store.sqlite.repair import repair
from runlane_server.store.sqlite.store import SqliteStore
from store.planting import BAD, GOOD, fork, play, run_id, view
from support.asking import DAY, ask, question
from support.story import TENANT

pytestmark = pytest.mark.sqlite("damages the rows of a file")

NAMES = [(table, column) for table, columns in COLUMNS.items() for column in columns]


async def seen(path: Path) -> object:
    """The store's view of the session that was not damaged."""
    async with SqliteStore(path) as store:
        return await view(store, GOOD)


async def with_names(path: Path) -> None:
    """Two sessions with a row in every table, and a fork of the damaged one with its copy."""
    async with SqliteStore(path) as store:
        await ask(await play(store, GOOD), question(timeout=DAY))
        bad = await play(store, BAD)
        await ask(bad, question(timeout=DAY))
        await fork(bad, f"{BAD}-fork", 2)
    with closing(sqlite3.connect(path)) as db, db:
        for name in (GOOD, BAD):
            of_run = f"'{TENANT}', '{name}-active'"
            db.execute(f"INSERT INTO kept_parts VALUES ({of_run}, 1, 1, 'x')")
            db.execute(f"INSERT INTO prompts VALUES ({of_run}, 'x') ON CONFLICT DO NOTHING")
            gone = f"'{TENANT}', '{name}-gone', '{name}-before', 'f', 1, 1"
            db.execute(f"INSERT INTO deleted_runs VALUES ({gone})")
            db.execute(f"INSERT OR IGNORE INTO tenant_logs VALUES ('t {name}', 0, 0)")
        of_fork = f"FROM sessions WHERE session_id = '{BAD}-fork'"
        db.execute(f"INSERT INTO copied_parts SELECT copy_id, '{BAD}-ended', 1, 1, 'x' {of_fork}")
        db.execute("UPDATE sessions SET stored_bytes = stored_bytes + 1 WHERE copy_id IS NOT NULL")


def damage_name(path: Path, table: str, column: str, *, everywhere: bool = False) -> None:
    """Makes a name of a row of the session `BAD` one that is not UTF-8."""
    first = next(each for each in COLUMNS[table] if each in ("session_id", "run_id", "tenant"))
    key = "session_id" if table == "sessions" else "run_id" if first != "session_id" else first
    key = "tenant" if table == "tenant_logs" else key
    with closing(sqlite3.connect(path)) as db, db:
        wanted = f"SELECT {column}, {key} FROM {table} WHERE {key} LIKE '%{BAD}%' LIMIT 1"
        value, of = db.execute(wanted).fetchone()
        for each, columns in COLUMNS.items():
            for name in columns:
                if everywhere and value:
                    db.execute(
                        f"UPDATE {each} SET {name} = CAST(x'6261ff' AS TEXT) WHERE {name} = ?",
                        (value,),
                    )
        if not everywhere:
            done = db.execute(
                f"UPDATE OR IGNORE {table} SET {column} = CAST(x'6261ff' AS TEXT)"
                f" WHERE {key} = ? AND {column} = ?",
                (of, value),
            )
            assert done.rowcount


@pytest.mark.parametrize(("table", "column"), NAMES)
async def test_name_that_is_not_utf8_is_replaced_by_its_hexadecimal_form(
    table: str, column: str, tmp_path: Path
) -> None:
    path = tmp_path / "runlane.db"
    await with_names(path)
    assert check(path).problems == ()
    good = await seen(path)
    damage_name(path, table, column)
    assert f"names: a {column} of {table} is not UTF-8: x6261ff" in check(path).problems
    line = f"a {column} of {table} that is not UTF-8 was replaced by x6261ff"
    assert line in await repair(path)
    # What refers to the row by its former name is found by the other checks.
    assert not any(problem.startswith("names:") for problem in check(path).problems)
    assert await repair(path) == []
    assert await seen(path) == good


@pytest.mark.parametrize("column", ["session_id", "run_id", "input_request_id", "message_id"])
async def test_rows_that_share_a_name_stay_together(column: str, tmp_path: Path) -> None:
    path = tmp_path / "runlane.db"
    await with_names(path)
    table = next(each for each, columns in COLUMNS.items() if column in columns)
    damage_name(path, table, column, everywhere=True)
    assert any("x6261ff" in problem for problem in check(path).problems)
    await repair(path)
    problems = [each for each in check(path).problems if column != "message_id"]
    assert problems == []
    async with SqliteStore(path) as store:
        session = "x6261ff" if column == "session_id" else BAD
        assert await store.get_session(SessionKey(TENANT, session)) is not None
        key = RunKey(TENANT, "x6261ff" if column == "run_id" else run_id(BAD, "ended"))
        found = await store.get_run(key)
        assert found is not None
        assert found.session_id == session
