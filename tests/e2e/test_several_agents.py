"""Several agents on one server process, as operators and clients see them (R31, R32)."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from runlane import AgentAbility, AgentInfo, AgentNotFound, Client, PermissionDenied, RunState
from runlane_server.access import editing
from runlane_server.access.caller import Role
from support.command import START
from support.server import clean_environment, run_to_exit, serving
from support.staging import SECONDS

FLAGS = (
    *("--agent", "shout=command:tr a-z A-Z", "--agent", "default=echo"),
    *("--agent", "away=echo", "--agent-slots", "away=0"),
)


async def test_r31_a_run_is_executed_by_the_agent_it_names(tmp_path: Path) -> None:
    async with serving(tmp_path, *FLAGS) as server, Client(server.address) as client:
        found = await client.list_agents()
        assert [(it.name, it.kind, it.is_default, it.slots_limit) for it in found] == [
            ("shout", "command", False, None),
            ("default", "echo", True, None),
            ("away", "echo", False, 0),
        ]
        # A server listens before its agents have started.
        async with asyncio.timeout(SECONDS):
            while [it.ready for it in found] != [True, True, False]:
                found = await client.list_agents()
        assert [it.can for it in found] == [(), (AgentAbility.FOLD,), (AgentAbility.FOLD,)]
        handle = await client.run_accepted("s", "one", agent="shout", allow_missing=True)
        assert (handle.run.agent, (await handle.completed()).text) == ("shout", "ONE")
        await client.create_session("t", agent="shout")
        assert (await client.get_session("t")).agent == "shout"
        assert (await (await client.run_accepted("t", "two")).completed()).text == "TWO"
        with pytest.raises(AgentNotFound):
            await client.run_accepted("s", "x", agent="nobody")
        waiting = await client.run_accepted("s", "x", agent="away")
        shouted = await client.run_accepted("t", "three")
        assert (await shouted.completed()).text == "THREE"
        assert (await client.get_run(waiting.run_id)).state is RunState.ACCEPTED
        assert [it.run_id for it in (await client.cancel("s")).cancelled] == [waiting.run_id]


async def _runlane(address: str, *arguments: str) -> str:
    """The output of the command `runlane` against a server."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *START, *arguments),
        env=clean_environment() | {"RUNLANE_SERVER": address},
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
    )
    out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return out.decode()


async def test_r31_the_command_line_names_agents(tmp_path: Path) -> None:
    async with serving(tmp_path, *FLAGS) as server:
        assert (await _runlane(server.address, "run", "--agent", "shout", "hi")).strip() == "HI"
        listed = await _runlane(server.address, "agents", "--json")
        assert [json.loads(line)["name"] for line in listed.splitlines()] == [
            "shout",
            "default",
            "away",
        ]


async def test_health_is_per_agent_and_its_list_names_none(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, *FLAGS) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        states = health_pb2.HealthCheckResponse
        for name, expected in (("shout", states.SERVING), ("away", states.NOT_SERVING)):
            request = health_pb2.HealthCheckRequest(service=f"runlane.agent/{name}")
            async with asyncio.timeout(SECONDS):
                # Another agent may get ready a moment later.
                while (await stub.Check(request)).status != expected:
                    await asyncio.sleep(0)
        listed = await stub.List(health_pb2.HealthListRequest())
        assert not [name for name in listed.statuses if "agent/" in name]


async def test_a_token_is_limited_to_its_agents(tmp_path: Path) -> None:
    access = tmp_path / "access.toml"
    token = editing.add(access, "ci", tenant="t", role=Role.RUN, expires=None)
    access.write_text(access.read_text() + 'agents = ["shout"]\n')
    flags = ("--access", str(access))
    async with (
        serving(tmp_path, *FLAGS, *flags) as server,
        Client(server.address, token=token) as client,
    ):
        assert [it.name for it in await client.list_agents()] == ["shout"]
        handle = await client.run_accepted("s", "one", agent="shout", allow_missing=True)
        assert (await handle.completed()).text == "ONE"
        for agent in ("", "default", "nobody"):
            with pytest.raises(PermissionDenied, match="may not use the agent"):
                await client.run_accepted("s", "x", agent=agent)
        with pytest.raises(PermissionDenied):
            await client.create_session("u", agent="default")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--agent", "Coder=echo"], "'Coder' is not a name of an agent"),
        (["--agent", "a=echo", "--agent", "a=echo"], "'a' is declared twice"),
        (["--agent", "echo", "--agent", "scripted"], "'default' is declared twice"),
        (["--agent", "a="], "agent 'a' has no spec"),
        (["--agent", "a=nothing"], "there is no agent 'nothing'"),
        (["--agent-slots", "a=1"], "there is no agent 'a'"),
        (["--agent-slots", "default=-1"], "must be a whole number"),
    ],
)
async def test_wrong_agents_are_refused_at_the_start(
    tmp_path: Path, flags: list[str], problem: str
) -> None:
    arguments = ("--listen", "127.0.0.1:0", "--store", "memory:", *flags)
    code, _, errors = await asyncio.to_thread(run_to_exit, tmp_path, *arguments)
    assert (code, problem in errors) == (2, True), errors


async def test_the_agents_may_stand_in_a_table_or_in_lines(tmp_path: Path) -> None:
    file = tmp_path / "runlane.toml"
    file.write_text('[agent]\na = "echo"\nb = "scripted"\n[agent-slots]\nb = 2\n')
    expected = [("a", "echo", None), ("b", "scripted", 2)]

    def seen(agents: tuple[AgentInfo, ...]) -> list[tuple[str, str, int | None]]:
        return [(it.name, it.kind, it.slots_limit) for it in agents]

    async with (
        serving(tmp_path, "--config", str(file)) as server,
        Client(server.address) as client,
    ):
        assert seen(await client.list_agents()) == expected
    env = {"RUNLANE_AGENT": "a=echo\nb=scripted\n", "RUNLANE_AGENT_SLOTS": "b=2"}
    async with (
        serving(tmp_path, env=env) as server,
        Client(server.address) as client,
    ):
        assert seen(await client.list_agents()) == expected
