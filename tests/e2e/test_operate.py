"""Operations on a running server: retention, backup, check, restore."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from runlane import Client, CursorCompacted, CursorInvalid, RunlaneError
from support.server import run_to_exit, serving
from support.staging import SECONDS


async def operate(folder: Path, *arguments: str) -> tuple[int, list[str], list[str]]:
    """Runs a command of `runlane-server`: its exit code, and its lines on stdout and stderr."""
    code, out, err = await asyncio.to_thread(run_to_exit, folder, *arguments)
    return code, out.splitlines(), err.splitlines()


async def run_to_end(client: Client, session_id: str, prompt: str) -> None:
    handle = await client.run_accepted(session_id, prompt, allow_missing=True)
    await handle.completed(SECONDS)


@pytest.mark.sqlite("backup and check are of a file")
async def test_backup_and_check_work_on_a_server_under_load(tmp_path: Path) -> None:
    store = ("--store", "sqlite:///runlane.db")
    async with serving(tmp_path, *store) as server, Client(server.address) as client:
        stop = asyncio.Event()

        async def load(n: int) -> None:
            count = 0
            while not stop.is_set():
                await run_to_end(client, f"s{n}-{count % 10}", "hello")
                count += 1

        users = [asyncio.create_task(load(n)) for n in range(8)]
        for n in range(2):
            code, out, err = await operate(tmp_path, "backup", f"{n}.db", *store)
            assert (code, len(out), err) == (0, 1, [])
            assert out[0].startswith(f"{n}.db: ")
            code, out, err = await operate(tmp_path, "check", *store)
            assert (code, len(out), err) == (0, 1, []), out
            assert "no problems" in out[0]
        stop.set()
        await asyncio.gather(*users)
        assert "error" not in server.log
    for n in range(2):
        code, out, _ = await operate(tmp_path, "check", "--store", f"sqlite:///{n}.db")
        assert code == 0, out


@pytest.mark.sqlite("backup and restore are of a file")
async def test_restored_backup_serves_and_refuses_older_cursors(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, Client(server.address) as client:
        async with client.subscribe_run_complete(from_beginning=True) as subscription:
            await run_to_end(client, "s", "before")
            assert (await anext(subscription)).text == "before"
            cursor = subscription.cursor
        code, *_ = await operate(tmp_path, "backup", "copy.db")
        assert code == 0
        await run_to_end(client, "s", "lost with the restore")
    copy = ("--store", "sqlite:///copy.db")
    async with serving(tmp_path, *copy) as server, Client(server.address) as client:
        await run_to_end(client, "s", "after")
        with pytest.raises(CursorInvalid):
            async with client.subscribe_run_complete(cursor=cursor):
                pass
        async with client.subscribe_run_complete(from_beginning=True) as subscription:
            texts = [(await anext(subscription)).text for _ in range(2)]
        assert texts == ["before", "after"]


@pytest.mark.sqlite("the copy is of a file")
async def test_repair_asks_for_a_backup_and_says_what_it_did(tmp_path: Path) -> None:
    store = ("--store", "sqlite:///runlane.db")
    async with serving(tmp_path, *store) as server, Client(server.address) as client:
        await (await client.run_accepted("s", "p", run_id="r", allow_missing=True)).completed()
        code, _, err = await operate(tmp_path, "check", *store, "--repair", "--no-backup")
        assert (code, "in use by another server" in err[-1]) == (1, True)
    with closing(sqlite3.connect(tmp_path / "runlane.db")) as db, db:
        db.execute("UPDATE events SET body = '{}'")
    for flags in (("--repair",), ("--no-backup",), ("--repair", "--no-backup", "--backup", "b")):
        code, _, err = await operate(tmp_path, "check", *store, *flags)
        assert (code, "--repair requires --backup FILE" in " ".join(err)) == (2, True)
    code, out, _ = await operate(tmp_path, "check", *store, "--repair", "--backup", "before.db")
    copied, repaired, *sound = out
    assert len(sound) == 1
    assert code == 0
    assert copied.startswith("before.db: ")
    assert repaired == "terminal event of run default/r was replaced"
    assert "no problems in 1 sessions, 1 runs, 1 terminal events" in sound[0]
    assert (await operate(tmp_path, "check", "--store", "sqlite:///before.db"))[0] == 1


@pytest.mark.sqlite("check is of a file")
async def test_check_reports_each_inconsistency(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, Client(server.address) as client:
        await run_to_end(client, "s", "hello")
        await server.stop()
    with closing(sqlite3.connect(tmp_path / "runlane.db")) as db:
        db.execute("UPDATE sessions SET active_run_id = 'ghost', waiting_runs = 2")
        db.execute("INSERT INTO prompts VALUES ('default', 'nobody', 'x')")
        db.commit()
    code, out, err = await operate(tmp_path, "check", "--store", "sqlite:///runlane.db")
    assert (code, err) == (1, [])
    assert out == [
        "lanes: session default/s names the active run ghost, which does not exist",
        "prompts: the prompt of run default/nobody has no run",
    ]


@pytest.mark.sqlite("backup and check are of a file")
@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (["check"], 1, "runlane.db: the file does not exist"),
        (["check", "--store", "memory:"], 1, "a memory store ends with its server"),
        (["backup"], 2, "PATH"),
        (["backup", "x.db"], 1, "runlane.db: the file does not exist"),
        (["backup", "x.db", "--store", "postgresql://h/d"], 1, "postgresql"),
        (["backup", "x.db", "--listen", ":1"], 2, "--listen"),
        (["--store", "sqlite:///x.db", "check"], 2, "--store must come after 'check'"),
        (["restore"], 2, "restore"),
    ],
)
async def test_an_impossible_command_fails_with_one_line(
    tmp_path: Path, arguments: list[str], code: int, why: str
) -> None:
    returned, out, err = await operate(tmp_path, *arguments)
    assert (returned, out, len(err)) == (code, [], 1)
    assert err[0].startswith("runlane-server: error: ")
    assert why in err[0]
    assert os.listdir(tmp_path) == []  # noqa: PTH208


async def test_retention_removes_old_data_of_a_running_server(
    tmp_path: Path, store_kind: str
) -> None:
    flags = ("--event-retention-bytes", "20000", "--session-retention", "100ms")
    async with serving(tmp_path, *flags) as server, Client(server.address) as client:
        first = await client.run_accepted("gone", "hello", allow_missing=True)
        await first.completed(SECONDS)
        async with asyncio.timeout(SECONDS):
            while [session async for session in client.list_sessions()]:
                await asyncio.sleep(0.01)
        with pytest.raises(RunlaneError):
            await client.get_run(first.run_id)
        # The terminal event outlives the session, until the log exceeds its limit.
        async with client.subscribe_run_complete(cursor=first.cursor) as subscription:
            assert (await anext(subscription)).run_id == first.run_id
        async with asyncio.timeout(SECONDS):
            while True:
                await run_to_end(client, "busy", "x" * 2_000)
                try:
                    async with client.subscribe_run_complete(cursor=first.cursor):
                        pass
                except CursorCompacted:
                    break
    if store_kind == "sqlite":
        code, out, _ = await operate(tmp_path, "check")
        assert code == 0, out


async def test_renewed_database_refuses_older_cursors(tmp_path: Path, postgres_url: str) -> None:
    store = ("--store", postgres_url)
    async with serving(tmp_path, *store) as server:
        async with Client(server.address) as client:
            handle = await client.run_accepted("s", "hello", allow_missing=True)
            await handle.completed(SECONDS)
            cursor = handle.cursor
        code, _, err = await operate(tmp_path, "renew", *store)
        assert (code, len(err)) == (1, 1)
        assert f"({server.address}); stop them" in err[0]
        assert await server.stop() == 0
        code, out, err = await operate(tmp_path, "renew", *store)
        assert (code, len(out)) == (0, 1), err
        await server.start()
        async with Client(server.address) as client:
            with pytest.raises(CursorInvalid):
                await anext(client.subscribe_run_complete(cursor=cursor))
            async for complete in client.subscribe_run_complete(from_beginning=True):
                assert complete.session_id == "s"
                break
