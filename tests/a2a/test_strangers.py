"""gRPC admits a caller by the metadata of its call, and reads nothing of others."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from a2a.types import a2a_pb2 as pb

from runlane_a2a import grpc_transport
from runlane_a2a.grpc_transport import SERVICE, SLOTS, has_more_elements
from runlane_a2a.operations import OPERATIONS
from runlane_server.testing import LocalServer
from runlane_web.guard import Policy
from support.a2a_door import A2A, Failed, a2a_door, message
from support.callers import guarded
from support.raw_http2 import raw_connection

SECONDS = 20.0


def silent(a2a: A2A, name: str, *metadata: tuple[str, str]) -> Any:
    """Calls an operation, and sends no message."""
    channel: Any = a2a.channel
    return channel.stream_stream(f"/{SERVICE}/{name}")(metadata=metadata)


def known(a2a: A2A) -> tuple[tuple[str, str], ...]:
    return tuple((key.lower(), value) for key, value in a2a.headers.items())


async def code_of(call: Any) -> grpc.StatusCode:
    async with asyncio.timeout(SECONDS):
        code: grpc.StatusCode = await call.code()
    return code


async def test_a_stranger_is_refused_before_its_message(tmp_path: Path) -> None:
    async with guarded(tmp_path) as world, a2a_door(world.wire.address, Policy()) as a2a:
        invented = ("authorization", "Bearer invented")
        for each in OPERATIONS:
            for metadata in ((), (invented,)):
                code = await code_of(silent(a2a, each.name, *metadata))
                assert code is grpc.StatusCode.UNAUTHENTICATED, each.name


async def test_silent_strangers_take_no_place_of_others() -> None:
    async with LocalServer() as server, a2a_door(server.address) as a2a:
        held = [silent(a2a, "SendStreamingMessage") for _ in range(1200)]
        codes = {await code_of(each) for each in held}
        # The end of a stream that its caller holds open may overtake the status.
        assert codes <= {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.CANCELLED}
        assert (await a2a.task("grpc", message("x"))).status.state == pb.TASK_STATE_COMPLETED


async def test_a_message_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_transport, "MESSAGE_TIMEOUT", 0.2)
    async with LocalServer() as server, a2a_door(server.address) as a2a:
        for each in OPERATIONS:
            code = await code_of(silent(a2a, each.name, *known(a2a)))
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED, each.name


async def test_half_sent_messages_of_one_token_do_not_block_another(tmp_path: Path) -> None:
    async with guarded(tmp_path) as world, a2a_door(world.wire.address, Policy()) as a2a:
        a2a.token = world.texts["admin"]
        held = [silent(a2a, "GetTask", *known(a2a)) for _ in range(SLOTS * 3)]
        a2a.token = world.texts["stranger"]
        async with asyncio.timeout(grpc_transport.MESSAGE_TIMEOUT / 2):
            with pytest.raises(Failed) as failed:
                await a2a.get("r-theirs", "grpc")
        assert failed.value.reasons == ["TASK_NOT_FOUND", "RUN_NOT_FOUND"]
        assert not any(each.done() for each in held)
        for each in held:
            each.cancel()


async def test_a_call_without_a_message_is_refused() -> None:
    async with LocalServer() as server, a2a_door(server.address) as a2a:
        call = silent(a2a, "GetTask", *known(a2a))
        await call.done_writing()
        assert await code_of(call) is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_path_that_is_not_utf8_is_an_unknown_method() -> None:
    async with LocalServer() as server, a2a_door(server.address) as a2a, asyncio.timeout(SECONDS):
        address = f"127.0.0.1:{a2a.grpc_port}"
        for path in (b"/\xff", f"/{SERVICE}/".encode() + b"\xec"):
            async with raw_connection(address) as raw:
                await raw.until_ended(*[raw.open(path) for _ in range(5)])
        assert (await a2a.task("grpc", message("x"))).status.state == pb.TASK_STATE_COMPLETED


def many(kind: str) -> pb.SendMessageRequest:
    request = message("x")
    if kind == "parts":
        request.message.parts.extend([pb.Part()] * 900_000)
    elif kind == "references":
        request.message.reference_task_ids.extend(["a"] * 900_000)
    else:
        deep = request.message.metadata
        for n in range(20):
            deep.update({f"k{m}": n for m in range(300)})
            deep = deep.get_or_create_struct("deep")
    return request


@pytest.mark.parametrize("kind", ["parts", "references", "metadata"])
async def test_a_message_of_very_many_elements_is_refused_before_it_is_checked(kind: str) -> None:
    async with LocalServer() as server, a2a_door(server.address) as a2a:
        request = many(kind)
        async with asyncio.timeout(SECONDS / 4):
            with pytest.raises(Failed, match="more than 4096 fields") as failed:
                await a2a.call("grpc", "SendMessage", request)
    assert failed.value.fields == ["request"]


def test_elements_are_counted_at_any_depth() -> None:
    request = message("x", "y")
    request.message.metadata.update({"a": {"b": [1, 2]}})
    # The message; its id, role, metadata and 2 parts, each with a text.
    envelope = 1 + 3 + 2 + 2
    # The member a with a struct, in it b with a list, and in it 2 values with their numbers.
    metadata = 2 + 2 + 2 + 2
    assert has_more_elements(request, envelope + metadata - 1)
    assert not has_more_elements(request, envelope + metadata)
