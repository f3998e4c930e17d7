"""Audit lines name who changed what, and nobody for what was refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runlane import Client, PermissionDenied, SessionNotFound
from runlane_server.access import editing
from runlane_server.access.caller import Role
from support.server import ServerProcess, serving
from support.wire import Wire


def audited(server: ServerProcess) -> list[dict[str, Any]]:
    """The audit lines, without time, level and the peer's port."""
    lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    found = [line for line in lines if line.get("logger") == "runlane.audit"]
    assert all(line["peer"].startswith("ipv4:127.0.0.1:") for line in found)
    assert all((line["event"], line["level"]) == ("audit", "info") for line in found)
    left_out = {"timestamp", "level", "event", "logger", "peer", "process"}
    return [{key: it for key, it in line.items() if key not in left_out} for line in found]


async def test_every_change_of_a_caller_is_audited_by_name(tmp_path: Path) -> None:
    access = tmp_path / "access.toml"
    backend = editing.add(access, "backend", tenant="acme", role=Role.ADMIN)
    reader = editing.add(access, "reader", tenant="acme", role=Role.READ)
    flags = ("--access", str(access), "--agent", "scripted", "--log-format", "json")
    async with (
        serving(tmp_path, *flags) as server,
        Client(server.address, token=backend) as client,
        Client(server.address, token=reader) as other,
    ):
        handle = await Wire(client).start_blocked("s", "gate")
        with pytest.raises(PermissionDenied):
            await other.cancel("s")
        with pytest.raises(SessionNotFound):
            await client.cancel("nowhere")
        assert audited(server) == []
        await client.cancel("s", run_id=handle.run.run_id)
        await client.cancel_all()
        await handle.completed(30)
        await client.delete_session("s")
        who = {"tenant": "acme", "caller": "backend"}
        assert audited(server) == [
            {"method": "RunService/Cancel", **who, "session_id": "s", "run_id": handle.run.run_id},
            {"method": "RunService/CancelAll", **who},
            {"method": "SessionService/DeleteSession", **who, "session_id": "s"},
        ]
