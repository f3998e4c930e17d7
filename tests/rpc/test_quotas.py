"""Quotas over the wire: an exhausted quota affects its own tenant only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from runlane.v1 import run_pb2, session_service_pb2
from runlane.v1 import run_service_pb2 as pb
from runlane_server.access.caller import Caller, Credentials, Role
from runlane_server.access.control import AccessControl
from runlane_server.access.quotas import Quota, QuotaBook, Quotas
from runlane_server.core.limits import Limits
from support.rpc_wire import RpcFailure, Wire, refused, serving
from support.staging import SECONDS, say, script, wait

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


class TrustingAuthenticator:
    """Trusts the tenant that a call names in its metadata."""

    def authenticate(self, credentials: Credentials) -> Caller:
        tenant = credentials.metadata["tenant"]
        return Caller(tenant, Role.ADMIN, tenant)


@dataclass
class TenantClient:
    """Calls a server on behalf of a tenant."""

    wire: Wire
    tenant: str

    @property
    def metadata(self) -> tuple[tuple[str, str]]:
        return (("tenant", self.tenant),)

    async def accept(self, session_id: str, prompt: str, run_id: str = "") -> Any:
        request = pb.RunAcceptedRequest(
            session_id=session_id, prompt=prompt, run_id=run_id, allow_missing=True
        )
        return (await self.wire.runs.RunAccepted(request, metadata=self.metadata)).run

    async def start_blocked(self, gate: str) -> Any:
        """Starts a run in a new session that stays active until the gate opens."""
        run = await self.accept(gate, script(wait(gate)))
        await self.wire.latches.reached(gate)
        return run

    async def run(self, run_id: str) -> Any:
        request = pb.GetRunRequest(run_id=run_id)
        return (await self.wire.runs.GetRun(request, metadata=self.metadata)).run

    async def ended(self, run_id: str) -> Any:
        request = pb.WaitRunRequest(run_id=run_id)
        answered = self.wire.runs.WaitRun(request, metadata=self.metadata, timeout=SECONDS)
        return (await answered).run

    async def stream(self) -> Any:
        """A subscription that is open, which its first message proves."""
        call = self.wire.runs.SubscribeRunComplete(
            pb.SubscribeRunCompleteRequest(), metadata=self.metadata
        )
        assert await call.read() is not grpc.aio.EOF
        return call

    async def delete(self, session_id: str) -> None:
        request = session_service_pb2.DeleteSessionRequest(session_id=session_id)
        await self.wire.sessions.DeleteSession(request, metadata=self.metadata)


@dataclass
class Tenants:
    """A server with one limited tenant and one unlimited tenant."""

    wire: Wire
    book: QuotaBook
    access_control: AccessControl
    limited: TenantClient
    free: TenantClient

    def limit(self, **limits: Any) -> None:
        """Replaces the quota of the limited tenant."""
        self.book.replace(Quotas({"limited": Quota(**limits)}))


@asynccontextmanager
async def tenants(limits: Limits | None = None, **quota: Any) -> AsyncIterator[Tenants]:
    book = QuotaBook(Quotas({"limited": Quota(**quota)}))
    access_control = AccessControl(TrustingAuthenticator(), quotas=book)
    async with serving(limits, access=access_control, quotas=book) as wire:
        yield Tenants(
            wire, book, access_control, TenantClient(wire, "limited"), TenantClient(wire, "free")
        )


def names_quota(failure: RpcFailure, description: str) -> bool:
    """Whether an error names an exhausted quota of the limited tenant."""
    assert (failure.code, failure.reason) == (EXHAUSTED, "QUOTA_EXCEEDED")
    assert "'limited'" in failure.message
    assert description in failure.message
    return failure.quotas == [("limited", description)]


async def test_active_runs_beyond_the_quota_wait() -> None:
    async with tenants(max_active_runs=1) as both:
        limited, free = both.limited, both.free
        await limited.start_blocked("one")
        waits = await limited.accept("two", script(say("x")))
        for gate in ("three", "four"):
            await free.start_blocked(gate)
        assert (await limited.run(waits.run_id)).state == run_pb2.RUN_STATE_ACCEPTED
        both.wire.latches.open("one")
        assert (await limited.ended(waits.run_id)).state == run_pb2.RUN_STATE_COMPLETED
        for gate in ("three", "four"):
            both.wire.latches.open(gate)


async def test_a_raised_quota_starts_waiting_runs_at_once() -> None:
    async with tenants(max_active_runs=1) as both:
        await both.limited.start_blocked("one")
        await both.limited.accept("two", script(wait("two")))
        both.limit(max_active_runs=2)
        async with asyncio.timeout(SECONDS):
            await both.wire.latches.reached("two")
        for gate in ("one", "two"):
            both.wire.latches.open(gate)


async def test_waiting_runs_beyond_the_quota_are_refused() -> None:
    async with tenants(Limits(max_active_runs=0), max_waiting_runs=2) as both:
        for n in range(2):
            await both.limited.accept(f"s{n}", "x")
        failure = await refused(both.limited.accept("s2", "x"))
        assert names_quota(failure, "max_waiting_runs is 2")
        assert failure.retry_after == 1.0
        for n in range(3):
            await both.free.accept(f"s{n}", "x")
        cancel = pb.CancelRequest(session_id="s0")
        await both.wire.runs.Cancel(cancel, metadata=both.limited.metadata)
        await both.limited.accept("s2", "x")


async def test_accepts_in_progress_count_toward_the_quota() -> None:
    async with tenants(Limits(max_active_runs=0), max_waiting_runs=3) as both:
        begin = both.wire.coordinator.begin_accepted
        held = [begin(f"s{n}", tenant="limited") for n in range(3)]
        failure = await refused(both.limited.accept("s3", "x"))
        assert names_quota(failure, "max_waiting_runs is 3")
        held[0].close()
        held[0].close()
        await both.limited.accept("s3", "x")
        assert names_quota(await refused(both.limited.accept("s4", "x")), "max_waiting_runs is 3")
        for accepted in held:
            accepted.close()
        await both.limited.accept("s4", "x")


async def test_a_refused_accept_stores_nothing() -> None:
    async with tenants(Limits(max_active_runs=0), max_waiting_runs=1) as both:
        await both.limited.accept("s", "x", "r0")
        assert names_quota(
            await refused(both.limited.accept("t", "x", "r1")), "max_waiting_runs is 1"
        )
        assert (await refused(both.limited.run("r1"))).reason == "RUN_NOT_FOUND"
        listed = await both.wire.sessions.ListSessions(
            session_service_pb2.ListSessionsRequest(), metadata=both.limited.metadata
        )
        assert [session.session_id for session in listed.sessions] == ["s"]
        coordinator = both.wire.coordinator
        assert not await coordinator.is_session_busy("t", tenant="limited")
        receipts = await coordinator.cancel_all(tenant="limited")
        assert [run.run_id for receipt in receipts for run in receipt.cancelled] == ["r0"]


async def test_r03_a_repeated_accept_returns_its_run_despite_an_exhausted_quota() -> None:
    async with tenants(
        Limits(max_active_runs=0), max_waiting_runs=1, accepts_per_second=0.001
    ) as both:
        first = await both.limited.accept("s", "x", "r")
        again = await both.limited.accept("s", "x", "r")
        assert again == first
        failure = await refused(both.limited.accept("s", "other", "r"))
        assert failure.reason == "RUN_ID_CONFLICT"


async def test_accepts_beyond_the_rate_get_a_retry_delay() -> None:
    async with tenants(accepts_per_second=0.01, accepts_burst=3) as both:
        for n in range(3):
            await both.limited.accept(f"s{n}", script(say("x")))
        failure = await refused(both.limited.accept("s3", "x"))
        assert names_quota(failure, "accepts_per_second is 0.01")
        assert failure.retry_after is not None
        # The bucket gains a token every 100 s, and has started to.
        assert 50 < failure.retry_after <= 100
        for n in range(9):
            await both.free.accept(f"s{n}", script(say("x")))


async def create(client: TenantClient, session_id: str, **labels: str) -> None:
    request = session_service_pb2.CreateSessionRequest(session_id=session_id, metadata=labels)
    await client.wire.sessions.CreateSession(request, metadata=client.metadata)


async def test_creating_sessions_counts_toward_the_rate_of_accepts() -> None:
    async with tenants(accepts_per_second=0.01, accepts_burst=3) as both:
        await create(both.limited, "s0")
        await create(both.limited, "s1")
        await both.limited.accept("s0", script(say("x")))
        failure = await refused(create(both.limited, "s2"))
        assert names_quota(failure, "accepts_per_second is 0.01")
        assert failure.retry_after is not None
        for n in range(9):
            await create(both.free, f"s{n}")


async def test_labels_of_sessions_and_runs_count_toward_the_stored_bytes() -> None:
    async with tenants(max_stored_bytes=5_000) as both:
        await create(both.limited, "s0", large="x" * 4_000)
        await create(both.limited, "s1", large="x" * 1_000)
        failure = await refused(create(both.limited, "s2"))
        assert names_quota(failure, "max_stored_bytes is 5000")
        # What was added on this node is what the store counts.
        await both.wire.coordinator.stored.measure()
        assert names_quota(await refused(create(both.limited, "s2")), "max_stored_bytes is 5000")
        await both.limited.delete("s0")
        await both.wire.coordinator.stored.measure()
        await create(both.limited, "s2")
        await create(both.free, "s0", large="x" * 4_096)


async def test_streams_beyond_the_quota_are_refused_until_one_is_closed() -> None:
    async with tenants(max_streams=2) as both:
        run = await both.limited.start_blocked("g")
        first = await both.limited.stream()
        waiting = asyncio.ensure_future(both.limited.ended(run.run_id))
        follows = pb.SubscribeRunRequest(run_id=run.run_id)
        streams = both.access_control.stream_quota
        async with asyncio.timeout(SECONDS):
            while streams.of("limited") < 2:
                await asyncio.sleep(0)
        calls = (
            both.limited.stream(),
            both.limited.ended(run.run_id),
            both.wire.runs.SubscribeRun(follows, metadata=both.limited.metadata).read(),
        )
        for call in calls:
            failure = await refused(call)
            assert names_quota(failure, "max_streams is 2")
            assert failure.retry_after == 1.0
        # Other calls and other tenants are not affected.
        assert (await both.limited.run(run.run_id)).run_id == run.run_id
        others = [await both.free.stream() for _ in range(5)]
        both.wire.latches.open("g")
        assert (await waiting).state == run_pb2.RUN_STATE_COMPLETED
        first.cancel()
        async with asyncio.timeout(SECONDS):
            while streams.of("limited"):
                await asyncio.sleep(0)
        mine = [await both.limited.stream() for _ in range(2)]
        for call in (*others, *mine):
            call.cancel()


async def test_a_tenant_above_its_stored_bytes_accepts_again_after_a_deletion() -> None:
    async with tenants(max_stored_bytes=20_000) as both:
        run = await both.limited.accept("s", script(say("x" * 25_000)), "r")
        await both.limited.ended("r")
        measured = both.wire.coordinator.stored
        await measured.measure()
        failure = await refused(both.limited.accept("t", "x"))
        assert names_quota(failure, "max_stored_bytes is 20000")
        assert failure.retry_after is None
        assert (
            await both.limited.accept("s", script(say("x" * 25_000)), "r") != run
        )  # its state has changed
        await both.free.accept("s", script(say("x" * 30_000)))
        await both.limited.delete("s")
        await measured.measure()
        await both.limited.accept("t", "x")


async def test_accepts_since_the_last_measurement_count() -> None:
    async with tenants(Limits(max_active_runs=0), max_stored_bytes=10_000) as both:
        await both.limited.accept("s", "x" * 9_600)
        assert names_quota(
            await refused(both.limited.accept("t", "x")), "max_stored_bytes is 10000"
        )


@pytest.mark.parametrize(
    "quota",
    [
        {"max_waiting_runs": 0},
        {"max_stored_bytes": 0},
        {"accepts_per_second": 0.001, "accepts_burst": 1},
    ],
)
async def test_a_removed_quota_no_longer_limits(quota: dict[str, Any]) -> None:
    async with tenants(Limits(max_active_runs=0), **quota) as both:
        if "accepts_burst" in quota:
            await both.limited.accept("s", "x")
        assert (await refused(both.limited.accept("s", "x"))).reason == "QUOTA_EXCEEDED"
        both.book.replace(Quotas())
        await both.limited.accept("s", "x")


async def test_unnamed_tenants_have_a_quota_each() -> None:
    async with tenants(Limits(max_active_runs=0)) as both:
        both.book.replace(Quotas({"free": Quota()}, others=Quota(max_waiting_runs=1)))
        another = TenantClient(both.wire, "another")
        for caller in (both.limited, another):
            await caller.accept("s", "x")
            assert (await refused(caller.accept("s", "x"))).reason == "QUOTA_EXCEEDED"
        for _ in range(3):
            await both.free.accept("s", "x")
