"""Quotas in the access file: in force from the start, and replaced when the file changes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import runlane
from runlane import Client, QuotaExceeded, RetryPolicy
from runlane_server.access import editing
from runlane_server.access.caller import Role
from runlane_server.access.node_keys import NodeKeys
from runlane_server.access.quotas import Quota
from runlane_server.config import Config
from runlane_server.core.errors import StartError
from runlane_server.process.security import RECHECK_INTERVAL, Security
from support import server as processes

SECONDS = 30.0


def with_quotas(path: Path, quotas: str) -> str:
    """Writes an access file with a token and quotas; returns the token."""
    path.unlink(missing_ok=True)
    token = editing.add(path, "me", tenant="acme", role=Role.RUN)
    path.write_text(f"{path.read_text()}\n{quotas}")
    return token


def test_quotas_are_read_from_the_file_and_reloaded(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    with_quotas(path, '[tenants.acme]\nmax_streams = 3\n[tenants."*"]\nmax_active_runs = 1\n')
    security = Security(Config(access=str(path)))
    access_control = security.access_control(NodeKeys())
    assert security.quotas.of("acme") == Quota(max_streams=3)
    assert security.quotas.of("other") == Quota(max_active_runs=1)
    with_quotas(path, "[tenants.acme]\nmax_streams = 33\n")
    security.refresh(access_control)
    assert security.quotas.of("acme") == Quota(max_streams=33)
    # An invalid file changes nothing.
    with_quotas(path, "[tenants.acme]\nmax_streams = -1\n")
    security.refresh(access_control)
    assert security.quotas.of("acme") == Quota(max_streams=33)
    with pytest.raises(StartError, match=r"tenants\.acme\.max_streams: .* whole number from 0"):
        Security(Config(access=str(path)))


async def test_a_server_enforces_the_quotas_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    token = with_quotas(path, "[tenants.acme]\nmax_waiting_runs = 1\nmax_streams = 0\n")
    flags = ("--store", "memory:", "--access", str(path), "--max-active-runs", "0")
    with processes.serving_blocking(tmp_path, *flags) as server:
        async with Client(server.address, token=token, retry=RetryPolicy(attempts=1)) as client:
            await client.run_accepted("s", "x", allow_missing=True)
            with pytest.raises(QuotaExceeded) as refused:
                await client.run_accepted("s", "x")
            (violation,) = refused.value.violations
            assert violation == runlane.Violation("acme", "max_waiting_runs is 1")
            assert refused.value.retry_after is not None
            with pytest.raises(QuotaExceeded, match="max_streams is 0"):
                await client.wait_run("r", timeout=0)
            path.write_text(path.read_text().replace("max_waiting_runs = 1", ""))
            async with asyncio.timeout(SECONDS):
                while True:
                    try:
                        await client.run_accepted("s", "x")
                        break
                    except QuotaExceeded:
                        await asyncio.sleep(RECHECK_INTERVAL / 10)


async def test_a_server_measures_stored_bytes_and_refuses_accepts(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    token = with_quotas(path, "[tenants.acme]\nmax_stored_bytes = 6_000\n")
    flags = ("--store", "sqlite:///runlane.db", "--access", str(path), "--max-active-runs", "0")
    for wanted in ("accepted", "refused"):
        # The second server knows the size only from the store.
        with processes.serving_blocking(tmp_path, *flags) as server:
            async with (
                Client(server.address, token=token, retry=RetryPolicy(attempts=1)) as client,
                asyncio.timeout(SECONDS),
            ):
                if wanted == "accepted":
                    await client.run_accepted("s", "x" * 5_800, allow_missing=True)
                    continue
                refusal: runlane.RunlaneError | None = None
                while not isinstance(refusal, QuotaExceeded):
                    with pytest.raises((QuotaExceeded, runlane.SessionNotFound)) as refused:
                        await client.run_accepted("none", "x")
                    refusal = refused.value
                    await asyncio.sleep(RECHECK_INTERVAL / 10)
                assert refusal.retry_after is None
