"""Calls in flight and unread answers: what a caller makes the server hold is bounded."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import (  # type: ignore[import-untyped]
    reflection_pb2,
    reflection_pb2_grpc,
)

from runlane.v1 import run_service_pb2 as pb
from runlane.v1 import session_service_pb2
from runlane_server.access import call_limits, stream_quota
from runlane_server.access.caller import Caller, Credentials, Role
from runlane_server.access.control import AccessControl
from runlane_server.access.quotas import Quota, QuotaBook, Quotas
from runlane_server.core.errors import Overloaded
from runlane_server.rpc.inflight import InflightCalls
from runlane_server.rpc.middleware import Middleware
from support.raw_http2 import message, raw_connection
from support.rpc_wire import Wire, refused, serving
from support.staging import SECONDS, say, script

MESSAGES = "/runlane.v1.SessionService/ListMessages"
GET_RUN = "/runlane.v1.RunService/GetRun"
WATCH = "/grpc.health.v1.Health/Watch"

ACME = (("tenant", "acme"),)
OTHER = (("tenant", "other"),)


class NamedTenants:
    """Trusts the tenant that a call names."""

    def authenticate(self, credentials: Credentials) -> Caller:
        return Caller(credentials.metadata["tenant"], Role.ADMIN, "")


async def get(wire: Wire, metadata: Any = ACME) -> str:
    call = wire.runs.GetRun(pb.GetRunRequest(run_id="none"), metadata=metadata)
    return (await refused(call)).reason


# --- Answers that nobody reads --------------------------------------------------------------------


async def test_answers_that_are_not_read_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_limits, "MAX_UNSENT", 24 << 20)
    access = AccessControl(NamedTenants())
    async with serving(access=access) as wire, asyncio.timeout(2 * SECONDS):
        await long_session(wire)
        asked = session_service_pb2.ListMessagesRequest(session_id="long", page_size=1000)
        body = message(asked.SerializeToString())
        async with (
            raw_connection(wire.address, window=0) as one,
            raw_connection(wire.address, window=0) as two,
        ):
            for raw in (one, two):
                streams = []
                for _ in range(30):
                    streams.append(raw.open(MESSAGES, tenant="acme"))
                    await raw.send(streams[-1], body, end=True)
                while len(raw.ended) < 20:
                    await raw.changed()
            unsent = access.call_limits.unsent_of("acme")
            # Both connections together have reached the limit of the tenant, neither more.
            assert 16 << 20 < unsent <= 24 << 20
            more = wire.sessions.ListMessages(asked, metadata=ACME)
            assert (await refused(more)).reason == "OVERLOADED"
            # A small answer is still given, and other tenants do not notice.
            assert await get(wire) == "RUN_NOT_FOUND"
            assert await get(wire, OTHER) == "RUN_NOT_FOUND"
        while not access.call_limits.is_empty:
            await asyncio.sleep(0)
        assert (await wire.sessions.ListMessages(asked, metadata=ACME)).messages


async def long_session(wire: Wire) -> None:
    """A session whose transcript fills a page."""
    for n in range(3):
        request = pb.RunAcceptedRequest(
            session_id="long",
            run_id=f"r{n}",
            prompt=script(say("x" * 900_000)),
            allow_missing=True,
        )
        await wire.runs.RunAccepted(request, metadata=ACME)
        await wire.runs.WaitRun(pb.WaitRunRequest(run_id=f"r{n}"), metadata=ACME)


# --- Calls in flight ------------------------------------------------------------------------------


@contextmanager
def at_most(monkeypatch: pytest.MonkeyPatch, calls: int) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(call_limits, "_MOST", {"tenant": calls, "host": calls})
        yield


async def test_calls_in_flight_are_limited_for_each_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    access = AccessControl(NamedTenants())
    with at_most(monkeypatch, 3):
        async with serving(access=access) as wire, asyncio.timeout(SECONDS):
            async with raw_connection(wire.address) as raw:
                for _ in range(3):
                    await raw.send(raw.open(GET_RUN, tenant="acme"), b"\0")
                while await get(wire) != "OVERLOADED":
                    pass  # until the three have arrived
                assert await get(wire, OTHER) == "RUN_NOT_FOUND"
                # Long-lived calls have a quota of their own.
                stream: Any = wire.runs.SubscribeRunComplete(
                    pb.SubscribeRunCompleteRequest(), metadata=ACME
                )
                assert (await stream.read()).HasField("progress")
                stream.cancel()
            while await get(wire) != "RUN_NOT_FOUND":
                pass  # until the connection is seen to be closed
            while not access.call_limits.is_empty:
                await asyncio.sleep(0)


async def test_health_watches_are_limited_for_each_host(monkeypatch: pytest.MonkeyPatch) -> None:
    with at_most(monkeypatch, 3):
        async with (
            serving() as wire,
            raw_connection(wire.address) as raw,
            asyncio.timeout(SECONDS),
        ):
            for _ in range(5):
                await raw.send(raw.open(WATCH), message(b""), end=True)
            while len(raw.ended) < 2:
                await raw.changed()
            assert await get(wire) == "RUN_NOT_FOUND"
            assert len(raw.ended) == 2


# --- Streams --------------------------------------------------------------------------------------


def subscribe(wire: Wire, ids: int) -> Any:
    request = pb.SubscribeRunCompleteRequest(run_ids=[f"r{n}" for n in range(ids)])
    return wire.runs.SubscribeRunComplete(request, metadata=ACME)


async def test_a_subscription_counts_for_its_ids() -> None:
    book = QuotaBook(Quotas({"acme": Quota(max_streams=10)}))
    access = AccessControl(NamedTenants(), quotas=book)
    async with serving(access=access, quotas=book) as wire, asyncio.timeout(SECONDS):
        streams = access.stream_quota
        large = subscribe(wire, 801)
        assert (await large.read()).HasField("progress")
        assert streams.of("acme") == 9
        assert (await refused(subscribe(wire, 101).read())).reason == "QUOTA_EXCEEDED"
        assert streams.of("acme") == 9
        small = subscribe(wire, 100)
        assert (await small.read()).HasField("progress")
        assert streams.of("acme") == 10
        large.cancel()
        small.cancel()
        while streams.of("acme"):
            await asyncio.sleep(0)


async def test_the_ids_of_all_subscriptions_are_limited_without_a_quota(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_quota, "MAX_IDS", 1_500)
    access = AccessControl(NamedTenants())
    async with serving(access=access) as wire, asyncio.timeout(SECONDS):
        first = subscribe(wire, 1_000)
        assert (await first.read()).HasField("progress")
        assert (await refused(subscribe(wire, 501).read())).reason == "OVERLOADED"
        second = subscribe(wire, 500)
        assert (await second.read()).HasField("progress")
        first.cancel()
        while access.stream_quota.of("acme") > 5:
            await asyncio.sleep(0)
        third = subscribe(wire, 1_000)
        assert (await third.read()).HasField("progress")
        second.cancel()
        third.cancel()


async def test_reflection_counts_as_a_stream() -> None:
    book = QuotaBook(Quotas({"acme": Quota(max_streams=0)}))
    access = AccessControl(NamedTenants(), quotas=book)
    async with serving(access=access, quotas=book) as wire:
        stub = reflection_pb2_grpc.ServerReflectionStub(wire.channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(iter([asked]), metadata=ACME)
        assert (await refused(call.read())).reason == "QUOTA_EXCEEDED"


# --- What an error holds --------------------------------------------------------------------------


class Held:
    """Stands for a request or an answer of several megabytes."""


async def test_an_error_frees_what_its_call_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC keeps the error of an abort in a cycle, so its frames would wait for the collector."""
    monkeypatch.setattr("runlane_server.access.control.is_allowed", lambda role, method: True)
    held: list[weakref.ref[Held]] = []

    async def fail(request: bytes, context: Any) -> bytes:
        large = Held()
        held.append(weakref.ref(large))
        raise Overloaded("full")

    server = grpc.aio.server()
    calls = InflightCalls()
    Middleware(server, calls, AccessControl()).add_registered_method_handlers(
        "runlane.Toy", {"Fail": grpc.unary_unary_rpc_method_handler(fail)}
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel: Any
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        gc.disable()
        try:
            for _ in range(5):
                assert (await refused(channel.unary_unary("/runlane.Toy/Fail")(b"x"))).reason
            assert await calls.wait_idle(SECONDS)
            assert [ref() for ref in held] == [None] * 5
        finally:
            gc.enable()
    await server.stop(0)
