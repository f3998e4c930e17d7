"""Rows that are damaged while a server runs, with readers and writers at work."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from runlane import Client, RunComplete, RunNotFound
from support.server import run_to_exit, serving
from support.staging import SECONDS

BAD = 7
"""The number of damaged runs, of session `bad`."""

DAMAGES = (
    "UPDATE events SET body = CAST(x'fffe' AS TEXT) WHERE run_id = 'bad-0'",
    "UPDATE events SET body = '{\"state\":1}' WHERE run_id = 'bad-1'",
    "UPDATE events SET body = x'00' WHERE run_id = 'bad-2'",
    "UPDATE runs SET state = 'dreaming' WHERE run_id = 'bad-3'",
    "UPDATE runs SET usage = '[1.5]' WHERE run_id = 'bad-4'",
    "UPDATE messages SET parts = '[[\"video\",1]]' WHERE run_id = 'bad-5' AND role = 'assistant'",
    "UPDATE run_events SET body = '[5]' WHERE run_id = 'bad-6' AND kind = 'text_delta'",
    "UPDATE sessions SET metadata = '[' WHERE session_id = 'bad'",
)


@pytest.mark.sqlite("rows are damaged in its file")
async def test_r21_damaged_rows_end_no_subscription_and_no_list(tmp_path: Path) -> None:
    store = ("--store", "sqlite:///runlane.db")
    expected: set[str] = set()

    async def play(client: Client, session_id: str, run_id: str) -> None:
        run = await client.run_accepted(session_id, "hi", run_id=run_id, allow_missing=True)
        expected.add(run_id)
        await run.completed(SECONDS)

    async with serving(tmp_path, *store) as server, Client(server.address) as client:
        for n in range(BAD):
            await play(client, "bad", f"bad-{n}")
    # A server that has just started has none of these events in memory.
    async with serving(tmp_path, *store) as server, Client(server.address) as client:
        stop = asyncio.Event()

        async def load(n: int) -> None:
            count = 0
            while not stop.is_set():
                await play(client, f"good-{n}", f"good-{n}-{count}")
                count += 1

        async def read() -> int:
            rounds = 0
            while not stop.is_set():
                sessions = {it.session_id: it async for it in client.list_sessions()}
                assert sessions["bad"].session_id == "bad"
                runs = [it async for it in client.list_runs(session_id="bad")]
                assert len(runs) == BAD
                assert len([it async for it in client.list_messages("bad")]) == 2 * BAD
                rounds += 1
            return rounds

        work = [asyncio.create_task(load(n)) for n in range(4)]
        readers = [asyncio.create_task(read()) for _ in range(2)]
        await asyncio.to_thread(damage, tmp_path / "runlane.db")

        damaged = await until_all(client, expected, BAD)
        assert {it.error.reason for it in damaged.values() if it.error} == {"CORRUPT_RECORD"}
        assert sorted(damaged) == ["bad-0", "bad-1", "bad-2"]
        events = [it async for it in client.subscribe_run("bad-6")]
        assert isinstance(events[-1].body, RunComplete)
        for run_id in ("bad-3", "bad-4"):
            run = await client.get_run(run_id)
            assert run.run_complete is not None
            assert run.run_complete.error is not None
            assert run.run_complete.error.reason == "CORRUPT_RECORD"
        assert (await client.get_session("bad")).metadata == {"runlane.error": "CORRUPT_RECORD"}
        code, out, _ = await asyncio.to_thread(run_to_exit, tmp_path, "check", *store)
        found = [line for line in out.splitlines() if line.startswith("records: ")]
        assert (code, len(found)) == (1, len(DAMAGES)), out

        stop.set()
        await asyncio.gather(*work)
        assert min(await asyncio.gather(*readers)) > 0
        assert len(await until_all(client, expected, BAD)) == 3
        await client.delete_session("bad")
        with pytest.raises(RunNotFound):
            await client.get_run("bad-0")
        code, out, _ = await asyncio.to_thread(run_to_exit, tmp_path, "check", *store)
        left = {line.split(" cannot")[0] for line in out.splitlines()}
        # The log outlives the session: what is left there goes by retention.
        assert left == {f"records: terminal event of run default/bad-{n}" for n in range(3)}


def damage(path: Path) -> None:
    with closing(sqlite3.connect(path, timeout=SECONDS, isolation_level=None)) as db:
        for statement in DAMAGES:
            assert db.execute(statement).rowcount > 0


async def until_all(client: Client, expected: set[str], least: int) -> dict[str, RunComplete]:
    """Subscribes from the beginning until every expected run has ended, each exactly once; returns
    the failed ones."""
    wanted = set(expected)
    assert len(wanted) >= least
    failed: dict[str, RunComplete] = {}
    seen: set[str] = set()
    async with (
        asyncio.timeout(SECONDS),
        client.subscribe_run_complete(from_beginning=True) as subscription,
    ):
        async for complete in subscription:
            assert complete.run_id not in seen
            seen.add(complete.run_id)
            if complete.error is not None:
                failed[complete.run_id] = complete
            if wanted <= seen:
                break
    return failed
