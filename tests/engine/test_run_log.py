"""The log of a healthy server: one line for a run that is accepted, that starts and that ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runlane import Client
from support.server import ServerProcess, serving
from support.staging import SECONDS, say, script, wait

LINES = {"run accepted", "run started", "run ended", "more runs ended"}


def lines_of(server: ServerProcess) -> list[dict[str, Any]]:
    """The lines about runs."""
    lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] in LINES]


async def test_a_run_has_a_line_for_its_accept_start_and_end(tmp_path: Path) -> None:
    async with serving(tmp_path, "--agent", "echo") as server, Client(server.address) as client:
        handle = await client.run_accepted("s", "a secret", run_id="r", allow_missing=True)
        await handle.completed(SECONDS)
        assert await server.stop() == 0
    lines = lines_of(server)
    assert [line["event"] for line in lines] == ["run accepted", "run started", "run ended"]
    assert {(line["level"], line["session_id"], line["run_id"]) for line in lines} == {
        ("info", "s", "r")
    }
    assert (lines[2]["state"], lines[2]["finish_reason"]) == ("completed", "stop")
    assert "secret" not in server.log


async def test_a_failed_run_has_its_reason_and_class_but_not_its_message(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "async def answer(turn):\n    yield 'x'\n    raise ValueError('se' + 'cret')\n"
    )
    flags = ("--agent", "broken:answer")
    async with serving(tmp_path, *flags) as server, Client(server.address) as client:
        handle = await client.run_accepted("s", "p", allow_missing=True)
        await handle.completed(SECONDS)
        assert await server.stop() == 0
    (end,) = (line for line in lines_of(server) if line["event"] == "run ended")
    assert (end["state"], end["error"], end["error_class"]) == (
        "failed",
        "AGENT_ERROR",
        "ValueError",
    )
    assert "secret" not in server.log


async def test_a_cancel_of_many_waiting_runs_has_a_bounded_number_of_lines(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, "--agent", "scripted") as server,
        Client(server.address) as client,
    ):
        first = await client.run_accepted("s", script(say("x"), wait("never")), allow_missing=True)
        for _ in range(50):
            await client.run_accepted("s", "p")
        receipt = await client.cancel("s")
        assert len(receipt.cancelled) == 51
        await first.completed(SECONDS)
        assert await server.stop() == 0
    ended = [line for line in lines_of(server) if "ended" in line["event"]]
    assert sum(line.get("count", 1) for line in ended) == 51
    assert len(ended) <= 22
