"""Log lines of refused calls name the caller and its address, and their rate is limited."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from runlane import Client, PermissionDenied, RunNotFound, Unauthenticated
from support.server import serving


def new_token(access: Path, name: str, role: str) -> str:
    command = (sys.executable, "-m", "runlane_server", "token", "new", name)
    flags = ("--access", str(access), "--tenant", "acme", "--role", role)
    return subprocess.run(
        (*command, *flags), capture_output=True, text=True, check=True
    ).stdout.strip()


async def test_refused_calls_name_their_caller_and_are_limited(tmp_path: Path) -> None:
    access = tmp_path / "access.toml"
    token = await asyncio.to_thread(new_token, access, "viewer", "read")
    async with serving(tmp_path, "--access", str(access)) as server:
        async with Client(server.address, token=token) as client:
            with pytest.raises(PermissionDenied):
                await client.run_accepted("s", "p", allow_missing=True)
            for n in range(100):
                with pytest.raises(RunNotFound):
                    await client.get_run(f"none {n}")
        async with Client(server.address, token="rl_wrong") as client:  # noqa: S106 - not a secret
            with pytest.raises(Unauthenticated):
                await client.get_run("none")
        assert await server.stop() == 0
    lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    calls = [line for line in lines if line["event"] == "call"]
    denied = next(line for line in calls if line["code"] == "PERMISSION_DENIED")
    assert (denied["method"], denied["caller"]) == ("RunService/RunAccepted", "viewer")
    assert denied["peer"].startswith("ipv4:127.0.0.1:")
    assert len(calls) == 60
    (unknown,) = (line for line in lines if line["event"] == "authentication failed")
    assert unknown["peer"].startswith("ipv4:127.0.0.1:")
    assert token not in server.log
