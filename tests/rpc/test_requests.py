"""Requests: nothing is read from strangers, and a hostile request costs others nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from runlane.v1 import run_service_pb2 as pb
from runlane.v1 import session_service_pb2 as sessions_pb
from runlane_server.access.caller import Caller, Credentials, Role
from runlane_server.access.control import AccessControl
from runlane_server.access.permissions import PUBLIC_METHODS, REQUIRED_ROLES
from runlane_server.core.errors import InvalidArgument, Unauthenticated
from runlane_server.rpc import middleware, requests
from runlane_server.rpc.checks import MAX_VIOLATIONS
from runlane_server.rpc.requests import (
    MAX_BYTES,
    MAX_FIELDS,
    MAX_MESSAGE,
    SLOTS,
    WINDOW,
    RefusedRequest,
    bounded,
    has_more_fields,
)
from support.callers import LIFETIME, guarded
from support.raw_http2 import RawConnection, message, raw_connection
from support.rpc_wire import Wire, refused, serving
from support.staging import SECONDS

GET_RUN = "/runlane.v1.RunService/GetRun"
ACCEPT = "/runlane.v1.RunService/RunAccepted"
CHECK = "/grpc.health.v1.Health/Check"

HALF = message(b"x" * (MAX_MESSAGE - 64))[:-1]
"""A message of the largest size without its last byte."""


@dataclass
class NamedTenants:
    """Trusts the tenant that a call names; a call that names none is a stranger's."""

    def authenticate(self, credentials: Credentials) -> Caller:
        tenant = credentials.metadata.get("tenant")
        if tenant is None:
            raise Unauthenticated("a stranger")
        return Caller(tenant, Role.ADMIN, tenant)


async def hold(connection: RawConnection, path: str, count: int, **metadata: str) -> list[int]:
    """Opens calls with a few bytes of their message."""
    streams = [connection.open(path, **metadata) for _ in range(count)]
    for stream in streams:
        await connection.send(stream, HALF[:100])
    return streams


# --- Strangers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [GET_RUN, ACCEPT, "/runlane.v1.RunService/SubscribeRun"])
async def test_the_message_of_a_stranger_is_not_taken_in(path: str) -> None:
    async with (
        serving(access=AccessControl(NamedTenants())) as wire,
        raw_connection(wire.address) as raw,
        asyncio.timeout(SECONDS),
    ):
        streams = [raw.open(path) for _ in range(20)]
        # Refused by their metadata alone, without a byte of a message.
        await raw.until_ended(*streams)
        late = raw.open(path)
        assert await raw.send_for(1.0, late, HALF) <= WINDOW
        await raw.until_ended(late)


async def test_a_caller_that_lost_its_access_while_its_message_arrived_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "SLOW_REQUEST", 0.0)
    asked = pb.RunAcceptedRequest(session_id="late", prompt="x" * 100_000, allow_missing=True)
    data = message(asked.SerializeToString())
    async with (
        guarded(tmp_path) as world,
        raw_connection(world.wire.address) as raw,
        asyncio.timeout(SECONDS),
    ):
        ((_, bearer),) = world.shown("expiring")
        stream = raw.open(ACCEPT, authorization=bearer)
        # More than the window: the server has admitted the call and reads.
        await raw.send(stream, data[:-1])
        # It expires before the server looks for such tokens again.
        world.clock[0] += LIFETIME + 1
        await raw.send(stream, data[-1:], end=True)
        await raw.until_ended(stream)
        found = await world.ask(
            "/runlane.v1.SessionService/GetSession",
            sessions_pb.GetSessionRequest(session_id="late"),
            world.shown("admin"),
        )
        assert found.code is grpc.StatusCode.NOT_FOUND


async def test_half_a_message_of_a_health_check_delays_no_other_check() -> None:
    async with (
        serving() as wire,
        raw_connection(wire.address) as raw,
        asyncio.timeout(SECONDS),
    ):
        streams = await hold(raw, CHECK, 2 * SLOTS)
        # Each slot is taken; the calls beyond have overtaken others: not the first ones that were
        # sent, but the first ones that arrived.
        while len(raw.ended.intersection(streams)) < SLOTS:
            await raw.changed()
        health = health_pb2_grpc.HealthStub(wire.channel)
        for _ in range(5):
            answer = await health.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


# --- Callers --------------------------------------------------------------------------------------


async def get_as(wire: Wire, tenant: str) -> str:
    """Gets a run that does not exist, and returns the reason of the refusal."""
    call = wire.runs.GetRun(pb.GetRunRequest(run_id="r"), metadata=(("tenant", tenant),))
    return (await refused(call)).reason


async def test_slow_requests_delay_their_own_tenant_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "PATIENCE", SECONDS)
    async with (
        serving(access=AccessControl(NamedTenants())) as wire,
        raw_connection(wire.address) as raw,
        asyncio.timeout(SECONDS),
    ):
        await hold(raw, GET_RUN, SLOTS, tenant="slow")
        mine = asyncio.ensure_future(get_as(wire, "slow"))
        # The first ones may arrive before the slow requests.
        while (await asyncio.wait({mine}, timeout=0.2))[0]:
            mine = asyncio.ensure_future(get_as(wire, "slow"))
        # While the slots of one tenant are taken, another tenant is served.
        for _ in range(5):
            assert await get_as(wire, "quick") == "RUN_NOT_FOUND"
        assert not mine.done()
        assert not raw.ended
        mine.cancel()


async def test_the_first_slow_request_loses_its_slot_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(requests, "PATIENCE", 0.5)
    async with (
        serving(access=AccessControl(NamedTenants())) as wire,
        raw_connection(wire.address) as raw,
        asyncio.timeout(SECONDS),
    ):
        streams = await hold(raw, GET_RUN, SLOTS, tenant="slow")
        # The first ones may arrive before the slow requests.
        while streams[0] not in raw.ended:
            assert await get_as(wire, "slow") == "RUN_NOT_FOUND"


async def test_many_requests_at_once_are_all_served() -> None:
    async with serving() as wire:
        calls = [
            refused(wire.runs.GetRun(pb.GetRunRequest(run_id=f"r{n}"))) for n in range(10 * SLOTS)
        ]
        assert {failure.reason for failure in await asyncio.gather(*calls)} == {"RUN_NOT_FOUND"}


async def test_a_call_without_a_message_is_refused() -> None:
    async with serving() as wire:
        channel: Any = wire.channel
        call = channel.stream_unary(GET_RUN, response_deserializer=bytes)(iter(()))
        failure = await refused(call)
        assert (failure.reason, failure.fields) == ("INVALID_ARGUMENT", ["request"])


# --- Paths ----------------------------------------------------------------------------------------


async def test_a_path_that_is_not_utf8_is_an_unknown_method() -> None:
    """grpc.aio (1.85) decodes the path in its accept loop, and its server ends."""
    async with serving() as wire, asyncio.timeout(SECONDS):
        for path in (b"/\xff", b"/runlane.v1.RunService/\xec", b"\xff"):
            async with raw_connection(wire.address) as raw:
                streams = [raw.open(path) for _ in range(5)]
                await raw.until_ended(*streams)
                # The connection lives on.
                await raw.until_ended(raw.open("/runlane.v1.RunService/Nothing"))
        channel: Any = wire.channel
        unknown = channel.unary_unary("/runlane.v1.RunService/Nothing")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await unknown(b"")
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert (await refused(wire.runs.GetRun(pb.GetRunRequest(run_id="r")))).reason


# --- Sizes ----------------------------------------------------------------------------------------


def test_every_method_has_a_size_limit() -> None:
    assert MAX_BYTES.keys() == REQUIRED_ROLES.keys() | PUBLIC_METHODS
    assert all(limit <= MAX_MESSAGE for limit in MAX_BYTES.values())


def never(data: bytes) -> object:
    raise AssertionError(f"{len(data)} bytes were parsed")


def refusal(decode: Callable[[bytes], object], data: bytes) -> str:
    decoded = decode(data)
    assert isinstance(decoded, RefusedRequest)
    assert isinstance(decoded.error, InvalidArgument)
    return decoded.error.message


@pytest.mark.parametrize("method", [name for name in MAX_BYTES if MAX_BYTES[name] < MAX_MESSAGE])
def test_a_request_beyond_its_size_is_not_parsed(method: str) -> None:
    data = bytes(MAX_BYTES[method] + 1)
    assert "the limit of this method" in refusal(bounded(never, method), data)


@pytest.mark.parametrize(
    "field",
    [
        pytest.param(b"\x2a\x00", id="empty-submessage"),
        pytest.param(b"\x2a\x02ab", id="bytes"),
        pytest.param(b"\x08\x01", id="number"),
        pytest.param(b"\x09" + bytes(8), id="eight-bytes"),
        pytest.param(b"\x0d" + bytes(4), id="four-bytes"),
        pytest.param(b"\xf8\xff\xff\xff\x0f\x01", id="unknown-number"),
        pytest.param(b"\x0b\x0c", id="group"),
    ],
)
def test_a_request_of_too_many_fields_is_not_parsed(field: bytes) -> None:
    data = field * (MAX_FIELDS + 1)
    assert f"more than {MAX_FIELDS} fields" in refusal(bounded(never, ACCEPT), data)
    assert not has_more_fields(field * (MAX_FIELDS // 2), MAX_FIELDS)


@pytest.mark.parametrize("data", [b"\x0a", b"\x0a\xff", b"\xff" * 20, b"\x0f\x01", b""])
def test_a_request_that_cannot_be_walked_is_left_to_the_parser(data: bytes) -> None:
    assert not has_more_fields(data, 0 if not data else MAX_FIELDS)


def test_the_largest_valid_subscription_fits() -> None:
    ids = [f"{n:04}".ljust(128, "x") for n in range(1000)]
    request = pb.SubscribeRunCompleteRequest(session_ids=ids, run_ids=ids, cursor="c" * 64)
    decode = bounded(
        pb.SubscribeRunCompleteRequest.FromString, "/runlane.v1.RunService/SubscribeRunComplete"
    )
    assert decode(request.SerializeToString()) == request


async def test_a_hostile_list_is_refused_at_its_length() -> None:
    async with serving() as wire:
        call = wire.runs.ListRuns(pb.ListRunsRequest(states=[99] * 60_000))  # type: ignore[list-item]
        failure = await refused(call)
        assert failure.fields == ["states"]
        assert "60000 entries" in failure.message


async def test_an_error_has_a_bounded_number_of_violations() -> None:
    async with serving() as wire:
        call = wire.runs.ListRuns(pb.ListRunsRequest(states=[99] * 1_000))  # type: ignore[list-item]
        failure = await refused(call)
        assert len(failure.fields) == MAX_VIOLATIONS
