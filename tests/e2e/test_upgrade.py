"""A server upgrades a database of the oldest schema, whose server was killed at work.

`oldest/` has such databases: dumps, written by the code that had those schemas.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from runlane import Client, RunIdConflict, RunState
from runlane_server.rpc.cursor import Cursors
from runlane_server.store.sqlfiles import migrations
from support.server import ServerProcess, run_to_exit, serving
from support.staging import SECONDS

OLDEST = Path(__file__).with_name("oldest")

ENDED = ["completed", "failed", "long", "cancelled", "deleted"]
"""The runs that had ended, in the order of the event log."""

LEASE = "1s"


def sqlite_store(folder: Path) -> tuple[str, bytes]:
    """The URL and the id of the oldest SQLite file."""
    with closing(sqlite3.connect(folder / "runlane.db")) as db:
        db.executescript((OLDEST / "sqlite.sql").read_text())
        (store_id,) = db.execute("SELECT value FROM meta WHERE name = 'store_id'").fetchone()
    return "sqlite:///runlane.db", store_id


async def postgres_store(url: str) -> tuple[str, bytes]:
    """The URL and the id of the oldest schema, in a new schema of this database."""
    from runlane_server.store.postgres.database import Database  # noqa: PLC0415 - an extra
    from support.postgres import plain  # noqa: PLC0415 - an extra

    schema = Database.parse(url).schema
    connection = await plain(url)
    dump = (OLDEST / "postgres.sql").read_text()
    await connection.execute("SET check_function_bodies = off")
    await connection.execute(
        dump.replace("oldest.", f"{schema}.").replace(" oldest;", f" {schema};")
    )
    store_id = await connection.fetchval(f"SELECT store_id FROM {schema}.store")  # noqa: S608
    await connection.close()
    return url, store_id


async def texts(client: Client, session_id: str) -> list[tuple[str, str]]:
    """The transcript of a session: author and text of each message."""
    return [(it.role.value, it.text) async for it in client.list_messages(session_id)]


async def ends_after(client: Client, cursor: str | None, count: int) -> list[str]:
    """The runs of the next terminal events."""
    async with (
        asyncio.timeout(SECONDS),
        client.subscribe_run_complete(cursor=cursor, from_beginning=cursor is None) as subscription,
    ):
        return [(await anext(subscription)).run_id for _ in range(count)]


async def nothing_is_lost(server: ServerProcess, store_id: bytes) -> None:
    """Every run of the old database is there, and those that had not ended go on."""
    async with Client(server.address) as client:
        completed = await client.get_run("completed")
        assert completed.state is RunState.COMPLETED
        assert completed.metadata == {"label": "x"}
        assert completed.run_complete is not None
        assert completed.run_complete.text == "an answer"
        assert (await client.get_run("failed")).state is RunState.FAILED
        cancelled = await client.get_run("cancelled")
        assert cancelled.state is RunState.CANCELLED
        assert (await client.get_session("done")).usage.input_tokens == 3
        assert (await client.get_session("empty")).title == "A title"
        said = await texts(client, "done")
        assert said[3] == ("assistant", "an answer")
        assert said[-1][1].startswith("long " * 300)

        interrupted = await client.wait_run("active", timeout=SECONDS)
        assert interrupted.run_complete is not None
        assert interrupted.run_complete.error is not None
        assert interrupted.run_complete.error.reason == "INTERRUPTED"
        assert (await client.wait_run("waiting", timeout=SECONDS)).state is RunState.COMPLETED
        await client.cancel("other")
        retried = await client.wait_run("retried", timeout=SECONDS)
        assert retried.state is RunState.CANCELLED
        assert retried.attempt == 2

        everything = await ends_after(client, None, 8)
        assert everything[:5] == ENDED
        assert sorted(everything[5:]) == ["active", "retried", "waiting"]
        cursor = Cursors(store_id).encode("default", 2)
        assert await ends_after(client, cursor, 6) == everything[2:]

        # The same request is the same run still (R3).
        with pytest.raises(RunIdConflict):
            await client.run_accepted("done", "another prompt", run_id="failed")
        again = await client.run_accepted("done", '[{"fail": "no"}]', run_id="failed")
        assert again.run.state is RunState.FAILED
        later = await client.run_accepted("done", '[{"text": "new"}]')
        assert (await later.completed(SECONDS)).text == "new"
        assert later.run.accept_seq == 4


async def upgraded(folder: Path, url: str, store_id: bytes) -> Sequence[str]:
    """Upgrades a store; returns what `check` prints about it."""
    flags = ("--store", url, "--agent", "scripted", "--node-lease", LEASE)
    async with serving(folder, *flags) as server:
        await nothing_is_lost(server, store_id)
        assert await server.stop() == 0
    code, out, err = await asyncio.to_thread(run_to_exit, folder, "check", "--store", url)
    assert (code, err) == (0, ""), out
    return out.splitlines()


@pytest.mark.sqlite("it is a file of SQLite")
async def test_oldest_sqlite_file_is_upgraded_and_loses_nothing(tmp_path: Path) -> None:
    url, store_id = sqlite_store(tmp_path)
    # Only the release that wrote it can back it up.
    code, _, err = await asyncio.to_thread(run_to_exit, tmp_path, "backup", "copy.db")
    assert code == 1
    assert "an older Runlane wrote it (schema 1" in err
    (verdict,) = await upgraded(tmp_path, url, store_id)
    assert "no problems in 4 sessions, 8 runs, 9 terminal events" in verdict


async def test_oldest_postgres_schema_is_upgraded_and_loses_nothing(
    tmp_path: Path, postgres_url: str
) -> None:
    url, store_id = await postgres_store(postgres_url)
    (verdict,) = await upgraded(tmp_path, url, store_id)
    assert "no problems in 4 sessions, 8 runs, 9 terminal events" in verdict


def test_the_page_has_every_step_of_the_schemas() -> None:
    page = (Path(__file__).parents[2] / "docs" / "upgrade.md").read_text()
    # The second cell may be "in 1", and has several numbers if one step of SQLite is several there.
    # A cell is empty where one of them has no such step.
    rows = re.findall(r"^\| (\d*) ?\| ((?:in 1|\d+(?:, \d+)*)?) ?\|", page, re.MULTILINE)
    sqlite_steps = {int(sqlite) for sqlite, _ in rows if sqlite}
    postgres_steps = {int(number) for _, steps in rows for number in re.findall(r"\d+", steps)}
    assert sqlite_steps == set(range(2, len(migrations("sqlite")) + 1))
    assert postgres_steps == {1} | set(range(4, len(migrations("postgres")) + 1))
