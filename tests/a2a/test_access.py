"""The caller's token decides the tenant and what is allowed; the card is for everybody."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import grpc
import pytest
from a2a.types import a2a_pb2 as pb
from google.protobuf.message import Message

from runlane_a2a.card import Addresses, make_card
from runlane_server.testing import LocalServer
from runlane_web.guard import Policy
from support.a2a_door import TRANSPORTS, URL, Failed, a2a_door, message
from support.callers import World, guarded

THEIRS: list[tuple[str, Message]] = [
    ("GetTask", pb.GetTaskRequest(id="r-theirs")),
    ("CancelTask", pb.CancelTaskRequest(id="r-theirs")),
    ("SubscribeToTask", pb.SubscribeToTaskRequest(id="r-theirs")),
    ("SendMessage", message("x", task_id="r-theirs")),
]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_tasks_of_another_tenant_do_not_exist(tmp_path: Path, transport: str) -> None:
    async with (
        guarded(tmp_path) as world,
        a2a_door(world.wire.address, Policy(), token=world.texts["stranger"]) as a2a,
    ):
        for name, request in THEIRS:
            with pytest.raises(Failed) as failed:
                await a2a.call(transport, name, request)
            assert failed.value.reasons == ["TASK_NOT_FOUND", "RUN_NOT_FOUND"], name
        listed = await a2a.call(transport, "ListTasks", pb.ListTasksRequest(context_id="s-theirs"))
        assert not listed.tasks
        # A context of the same name is another session.
        request = message('[{"text": "mine"}]', context_id="s-theirs")
        assert (await a2a.task(transport, request)).status.state == pb.TASK_STATE_COMPLETED
        a2a.token = world.texts["admin"]
        assert (await a2a.get("r-theirs", transport)).status.state == pb.TASK_STATE_WORKING


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_caller_without_access_is_refused(tmp_path: Path, transport: str) -> None:
    async with guarded(tmp_path) as world, a2a_door(world.wire.address, Policy()) as a2a:
        for token, reason in (
            ("a b", "UNAUTHENTICATED"),
            ("invented", "UNAUTHENTICATED"),
            (world.texts["read"], "PERMISSION_DENIED"),
        ):
            a2a.token = token
            with pytest.raises(Failed) as failed:
                await a2a.call(transport, "SendMessage", message("x"))
            assert failed.value.reasons == [reason]
            expected = {"UNAUTHENTICATED": (401, 16), "PERMISSION_DENIED": (403, 7)}[reason]
            assert failed.value.code == expected[transport == "grpc"]


async def test_a_token_of_a_browser_is_not_enough(tmp_path: Path) -> None:
    async with guarded(tmp_path) as world, a2a_door(world.wire.address, Policy()) as a2a:
        a2a.token = world.texts["admin"]
        body = {"sessionId": "s-theirs", "purpose": "chat"}
        made = await a2a.opened.http.post("/v1/tokens", json=body, headers=a2a.headers)
        a2a.token = made.json()["token"]
        for transport in TRANSPORTS:
            with pytest.raises(Failed, match="needs a token of the server") as failed:
                await a2a.get("r-theirs", transport)
            assert failed.value.reasons == ["UNAUTHENTICATED"]


async def test_a_revoked_token_ends(tmp_path: Path) -> None:
    async with guarded(tmp_path) as world, a2a_door(world.wire.address, Policy()) as a2a:
        a2a.token = world.texts["admin"]
        stream = a2a.stream("grpc", "SubscribeToTask", pb.SubscribeToTaskRequest(id="r-theirs"))
        await anext(stream)
        _revoke(world)
        with pytest.raises(Failed) as failed:
            async for _ in stream:
                pass
        assert failed.value.reasons == ["UNAUTHENTICATED"]


def _revoke(world: World) -> None:
    world.revoke("admin")
    world.look()


async def test_the_card_needs_no_token_and_names_the_address_of_the_settings() -> None:
    async with LocalServer() as server, a2a_door(server.address) as a2a:
        http = a2a.opened.http
        headers = {"Authorization": "", "Host": "localhost:1"}
        got = await http.get("/.well-known/agent-card.json", headers=headers)
        card = got.json()
        assert [each["url"] for each in card["supportedInterfaces"]] == [
            f"{URL}/a2a/jsonrpc",
            f"{URL}/a2a",
            "agents.example.com:443",
        ]
        assert {each["protocolVersion"] for each in card["supportedInterfaces"]} == {"1.0"}
        assert got.headers["cache-control"] == "public, max-age=300"
        tag = got.headers["etag"]
        again = await http.get("/.well-known/agent-card.json", headers={"If-None-Match": tag})
        assert (again.status_code, again.content) == (304, b"")
        other = await http.get("/.well-known/agent-card.json", headers={"If-None-Match": '"x"'})
        assert other.status_code == 200
        evil = await http.get("/.well-known/agent-card.json", headers={"Host": "evil.example"})
        assert evil.status_code == 421


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_the_extended_card_has_the_agents_of_the_caller(transport: str) -> None:
    async with (
        LocalServer(agents={"one": "echo", "two": "echo"}) as server,
        a2a_door(server.address) as a2a,
    ):
        card = await a2a.call(transport, "GetExtendedAgentCard", pb.GetExtendedAgentCardRequest())
    assert [skill.id for skill in card.skills] == ["chat", "one", "two"]


SKILLS = [{"id": "a", "name": "A", "description": "d", "tags": ["t"]}]


def test_a_card_file_describes_the_agent() -> None:
    described = {
        "name": "N",
        "description": "D",
        "skills": SKILLS,
        "defaultInputModes": ["image/*"],
    }
    card = make_card(Addresses(URL), json.dumps(described))
    assert (card.name, list(card.default_input_modes)) == ("N", ["image/*"])
    assert len(card.supported_interfaces) == 2


@pytest.mark.parametrize(
    ("described", "problem"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must be a JSON object"),
        ('{"name": 7}', "name"),
        ('{"nome": "x"}', "nome"),
        ('{"name": "x"}', "description is missing"),
        ('{"name": "x", "description": "y"}', "skills is missing"),
        ('{"supportedInterfaces": []}', "supportedInterfaces is set by the gateway"),
        ('{"capabilities": {}}', "capabilities is set by the gateway"),
    ],
)
def test_a_card_file_that_is_none_is_refused(described: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        make_card(Addresses(URL), described)


async def test_a_grpc_server_that_ends_unexpectedly_is_replaced() -> None:
    """No call is known that ends the server of grpc.aio; this ends it from inside."""
    async with LocalServer() as server, a2a_door(server.address) as a2a:
        assert (await a2a.task("grpc", message("x"))).status.state == pb.TASK_STATE_COMPLETED
        transport = a2a.served._grpc
        assert transport is not None
        broken = transport._server
        assert broken is not None
        await broken.stop(0)
        async with asyncio.timeout(20):
            while (state := a2a.channel.get_state()) is grpc.ChannelConnectivity.READY:
                await a2a.channel.wait_for_state_change(state)
            await a2a.channel.channel_ready()
        assert transport._server is not broken
        assert (await a2a.task("grpc", message("y"))).status.state == pb.TASK_STATE_COMPLETED
