"""Power cuts, failing or full disks, and read-only files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from proofs.crash.disk import Disk, NoCompiler, library
from proofs.crash.round import End, play
from proofs.crash.server import CrashServer
from runlane import Client, RetryPolicy, RunlaneError, RunNotFound, RunState, StoreUnavailable
from runlane.errors import is_transient
from support.server import FREE_PORT, ServerProcess, serving, start_fails
from support.staging import SECONDS

try:
    library()
except NoCompiler as reason:
    pytest.skip(str(reason), allow_module_level=True)

CARELESS = """
import sqlite3

connect = sqlite3.connect


class Careless(sqlite3.Connection):
    def execute(self, sql, *values):
        careless = sql.replace("synchronous = FULL", "synchronous = {setting}")
        return super().execute(careless, *values)


sqlite3.connect = lambda *args, **options: connect(*args, factory=Careless, **options)
"""
"""A `sitecustomize` that makes the server's SQLite sync less than its setting says."""


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path / "disk")


# --- Power cuts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
async def test_r01_all_rules_hold_after_a_power_cut(tmp_path: Path, disk: Disk, seed: int) -> None:
    """All rules hold for a disk that lost every unsynced write."""
    report = await play(f"cut {seed}", tmp_path, disk)
    assert report.violations == []
    assert report.history.acknowledged


async def test_r01_acknowledged_calls_survive_a_power_cut(tmp_path: Path, disk: Disk) -> None:
    assert await _missing_after_a_cut(tmp_path, disk) == 0


@pytest.mark.parametrize("setting", ["OFF", "NORMAL"])
async def test_a_server_that_does_not_sync_loses_acknowledged_runs(
    tmp_path: Path, disk: Disk, setting: str
) -> None:
    """The tests above fail for a server that acknowledges before the sync."""
    (tmp_path / "sitecustomize.py").write_text(CARELESS.replace("{setting}", setting))
    disk.env["PYTHONPATH"] = f"{tmp_path}:{disk.env.get('PYTHONPATH', '')}"
    assert await _missing_after_a_cut(tmp_path, disk) > 0


async def test_a_disk_that_ignores_syncs_loses_acknowledged_runs(
    tmp_path: Path, disk: Disk
) -> None:
    """The simulated power cut is real: without working syncs, acknowledged runs are lost."""
    assert await _missing_after_a_cut(tmp_path, disk, ignore_syncs=1) > 0


async def _missing_after_a_cut(tmp_path: Path, disk: Disk, **faults: int) -> int:
    """The number of acknowledged runs and cancels that are lost."""
    flags = ("--store", "sqlite:///a.db", "--max-active-runs", "0")
    cancelled: set[str] = set()
    kept: set[str] = set()
    async with serving(tmp_path, *flags, env=disk.env) as server, Client(server.address) as client:
        disk.set(**faults)

        async def use(session_id: str) -> None:
            for n in range(10):
                handle = await client.run_accepted(session_id, f"{n}", allow_missing=True)
                kept.add(handle.run_id)
                if n % 2:
                    receipt = await handle.cancel()
                    cancelled.update(run.run_id for run in receipt.cancelled)

        await asyncio.gather(*(use(f"s{n}") for n in range(8)))
    disk.cut_power(tmp_path)
    async with serving(tmp_path, *flags) as server, Client(server.address) as client:
        missing = 0
        for run_id in kept:
            try:
                run = await client.get_run(run_id)
                missing += (run.state is RunState.CANCELLED) != (run_id in cancelled)
            except RunNotFound:
                missing += 1
        return missing


# --- A disk that fails --------------------------------------------------------------------------


@pytest.mark.parametrize("power", ["stays", "cut"])
@pytest.mark.parametrize("faults", [{"fail_syncs": 0}, {"fail_syncs": 1}, {"fail_writes": 0}])
async def test_a_failing_disk_ends_the_server_and_a_retry_finds_the_outcome(
    tmp_path: Path, disk: Disk, faults: dict[str, int], power: str
) -> None:
    """The error reports an unknown outcome; after a retry there is exactly one run."""
    server = CrashServer(tmp_path, "echo", disk)
    await server.start()
    try:
        async with Client(server.address, retry=RetryPolicy(attempts=1)) as client:
            await (await client.run_accepted("s", "before", allow_missing=True)).completed(SECONDS)
            disk.set(**faults)
            run_ids = [f"r{n}" for n in range(3)]
            # Calls during the shutdown fail with an error of gRPC itself.
            kind = StoreUnavailable if faults == {"fail_syncs": 0} else RunlaneError
            with pytest.raises(kind) as error:
                await _accept_all(client, run_ids)
            assert is_transient(error.value)
            assert error.value.metadata["run_id"] in run_ids
        assert await server.wait() == 1
        _says_one_line(server, "SQLITE_IOERR" if "fail_syncs" in faults else "SQLITE_FULL")
        disk.set()
        if power == "cut":
            await server.kill()
        await server.start()
        async with Client(server.address) as client:
            for run_id in run_ids:
                handle = await client.run_accepted("s", "x", run_id=run_id, max_attempts=3)
                assert (await handle.completed(SECONDS)).text == "x"
            listed = [run.run_id async for run in client.list_runs("s")]
            assert sorted(listed[:-1]) == run_ids
            ended: list[str] = []
            async for complete in client.subscribe_run_complete(from_beginning=True):
                ended.append(complete.run_id)
                if complete.run_id == listed[0]:
                    break
            assert ended == listed[::-1]
    finally:
        disk.set()
        await server.kill()


@pytest.mark.parametrize("end", [End.SYNC_FAILS, End.DISK_FULL])
async def test_all_rules_hold_over_a_failing_disk(tmp_path: Path, disk: Disk, end: End) -> None:
    report = await play(f"fails {end}", tmp_path, disk, ends=((end, 150), (end, 300)))
    assert report.violations == []


async def _accept_all(client: Client, run_ids: Sequence[str]) -> None:
    for run_id in run_ids:
        await client.run_accepted("s", "x", run_id=run_id, max_attempts=3)


def _says_one_line(server: ServerProcess, reason: str) -> None:
    lines = [json.loads(line) for line in server.log.splitlines()]
    (error,) = [line for line in lines if line["level"] == "error"]
    assert reason in error["reason"]


# --- Read-only files -----------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
async def test_a_read_only_file_fails_the_start_with_one_line(
    tmp_path: Path, disk: Disk, there: bool
) -> None:
    flags = ("--store", "sqlite:///a.db")
    if there:
        async with serving(tmp_path, *flags) as server:
            await server.stop()
    disk.set(read_only=1)
    start = partial(start_fails, tmp_path, *flags, "--listen", FREE_PORT, env=disk.env)
    code, said = await asyncio.to_thread(start)
    assert code == 2
    (line,) = [line for line in said.splitlines() if not line.startswith("{")]
    assert line.startswith("runlane-server: error: store a.db: ")
