"""Quotas on the wire: what one tenant has used up, another does not feel."""

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
from runlane_server.access.door import Door
from runlane_server.access.quotas import Quota, QuotaBook, Quotas
from runlane_server.core.limits import Limits
from support.rpc_wire import Told, Wire, refused, serving
from support.staging import SECONDS, say, script, wait

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


class ByName:
    """Whoever says which tenant it is of, is."""

    def identify(self, credentials: Credentials) -> Caller:
        """An admin of that tenant."""
        tenant = credentials.metadata["tenant"]
        return Caller(tenant, Role.ADMIN, tenant)


@dataclass
class Somebody:
    """Somebody of a tenant."""

    wire: Wire
    tenant: str

    @property
    def who(self) -> tuple[tuple[str, str]]:
        return (("tenant", self.tenant),)

    async def accept(self, session_id: str, prompt: str, run_id: str = "") -> Any:
        request = pb.RunAcceptedRequest(
            session_id=session_id, prompt=prompt, run_id=run_id, allow_missing=True
        )
        return (await self.wire.runs.RunAccepted(request, metadata=self.who)).run

    async def blocked(self, gate: str) -> Any:
        """A run that is active, in a session of its own, until the gate opens."""
        run = await self.accept(gate, script(wait(gate)))
        await self.wire.gates.reached(gate)
        return run

    async def run(self, run_id: str) -> Any:
        request = pb.GetRunRequest(run_id=run_id)
        return (await self.wire.runs.GetRun(request, metadata=self.who)).run

    async def ended(self, run_id: str) -> Any:
        request = pb.WaitRunRequest(run_id=run_id)
        answered = self.wire.runs.WaitRun(request, metadata=self.who, timeout=SECONDS)
        return (await answered).run

    async def stream(self) -> Any:
        """A subscription that is open, which its first message proves."""
        call = self.wire.runs.SubscribeRunComplete(
            pb.SubscribeRunCompleteRequest(), metadata=self.who
        )
        assert await call.read() is not grpc.aio.EOF
        return call

    async def delete(self, session_id: str) -> None:
        request = session_service_pb2.DeleteSessionRequest(session_id=session_id)
        await self.wire.sessions.DeleteSession(request, metadata=self.who)


@dataclass
class Tenants:
    """A server for two tenants: one with a quota, the other without."""

    wire: Wire
    book: QuotaBook
    door: Door
    limited: Somebody
    free: Somebody

    def limit(self, **limits: Any) -> None:
        """Another quota for the one that is limited."""
        self.book.replace(Quotas({"limited": Quota(**limits)}))


@asynccontextmanager
async def tenants(limits: Limits | None = None, **quota: Any) -> AsyncIterator[Tenants]:
    book = QuotaBook(Quotas({"limited": Quota(**quota)}))
    door = Door(ByName(), quotas=book)
    async with serving(limits, door=door, quotas=book) as wire:
        yield Tenants(wire, book, door, Somebody(wire, "limited"), Somebody(wire, "free"))


def says(told: Told, description: str) -> bool:
    """Whether an error says which quota of the tenant is used up."""
    assert (told.code, told.reason) == (EXHAUSTED, "QUOTA_EXCEEDED")
    assert "'limited'" in told.message
    assert description in told.message
    return told.quotas == [("limited", description)]


async def test_active_runs_beyond_the_quota_wait() -> None:
    async with tenants(max_active_runs=1) as both:
        limited, free = both.limited, both.free
        await limited.blocked("one")
        waits = await limited.accept("two", script(say("x")))
        for gate in ("three", "four"):
            await free.blocked(gate)
        assert (await limited.run(waits.run_id)).state == run_pb2.RUN_STATE_ACCEPTED
        both.wire.gates.open("one")
        assert (await limited.ended(waits.run_id)).state == run_pb2.RUN_STATE_COMPLETED
        for gate in ("three", "four"):
            both.wire.gates.open(gate)


async def test_a_higher_quota_starts_at_once_what_waits() -> None:
    async with tenants(max_active_runs=1) as both:
        await both.limited.blocked("one")
        await both.limited.accept("two", script(wait("two")))
        both.limit(max_active_runs=2)
        async with asyncio.timeout(SECONDS):
            await both.wire.gates.reached("two")
        for gate in ("one", "two"):
            both.wire.gates.open(gate)


async def test_waiting_runs_beyond_the_quota_are_refused() -> None:
    async with tenants(Limits(max_active_runs=0), max_waiting_runs=2) as both:
        for n in range(2):
            await both.limited.accept(f"s{n}", "x")
        told = await refused(both.limited.accept("s2", "x"))
        assert says(told, "max_waiting_runs is 2")
        assert told.retry_after == 1.0
        for n in range(3):
            await both.free.accept(f"s{n}", "x")
        cancel = pb.CancelRequest(session_id="s0")
        await both.wire.runs.Cancel(cancel, metadata=both.limited.who)
        await both.limited.accept("s2", "x")


async def test_accepts_under_way_do_not_pass_the_quota_together() -> None:
    async with tenants(Limits(max_active_runs=0), max_waiting_runs=3) as both:
        begin = both.wire.coordinator.begin_accepted
        held = [begin(f"s{n}", tenant="limited") for n in range(3)]
        told = await refused(both.limited.accept("s3", "x"))
        assert says(told, "max_waiting_runs is 3")
        held[0].close()
        held[0].close()
        await both.limited.accept("s3", "x")
        assert says(await refused(both.limited.accept("s4", "x")), "max_waiting_runs is 3")
        for accepted in held:
            accepted.close()
        await both.limited.accept("s4", "x")


async def test_a_refused_accept_leaves_no_trace() -> None:
    async with tenants(Limits(max_active_runs=0), max_waiting_runs=1) as both:
        await both.limited.accept("s", "x", "r0")
        assert says(await refused(both.limited.accept("t", "x", "r1")), "max_waiting_runs is 1")
        assert (await refused(both.limited.run("r1"))).reason == "RUN_NOT_FOUND"
        listed = await both.wire.sessions.ListSessions(
            session_service_pb2.ListSessionsRequest(), metadata=both.limited.who
        )
        assert [session.session_id for session in listed.sessions] == ["s"]
        coordinator = both.wire.coordinator
        assert not await coordinator.is_session_busy("t", tenant="limited")
        receipts = await coordinator.cancel_all(tenant="limited")
        assert [run.run_id for receipt in receipts for run in receipt.cancelled] == ["r0"]


async def test_r03_a_repeated_accept_returns_its_run_though_the_quota_is_used_up() -> None:
    async with tenants(
        Limits(max_active_runs=0), max_waiting_runs=1, accepts_per_second=0.001
    ) as both:
        first = await both.limited.accept("s", "x", "r")
        again = await both.limited.accept("s", "x", "r")
        assert again == first
        told = await refused(both.limited.accept("s", "other", "r"))
        assert told.reason == "RUN_ID_CONFLICT"


async def test_accepts_beyond_the_rate_are_told_when_to_come_back() -> None:
    async with tenants(accepts_per_second=0.01, accepts_burst=3) as both:
        for n in range(3):
            await both.limited.accept(f"s{n}", script(say("x")))
        told = await refused(both.limited.accept("s3", "x"))
        assert says(told, "accepts_per_second is 0.01")
        assert told.retry_after is not None
        # One comes every 100 s, and the first is on its way.
        assert 50 < told.retry_after <= 100
        for n in range(9):
            await both.free.accept(f"s{n}", script(say("x")))


async def test_streams_beyond_the_quota_are_refused_until_one_is_closed() -> None:
    async with tenants(max_streams=2) as both:
        run = await both.limited.blocked("g")
        first = await both.limited.stream()
        waiting = asyncio.ensure_future(both.limited.ended(run.run_id))
        follows = pb.SubscribeRunRequest(run_id=run.run_id)
        streams = both.door.streams
        async with asyncio.timeout(SECONDS):
            while streams.of("limited") < 2:
                await asyncio.sleep(0)
        calls = (
            both.limited.stream(),
            both.limited.ended(run.run_id),
            both.wire.runs.SubscribeRun(follows, metadata=both.limited.who).read(),
        )
        for call in calls:
            told = await refused(call)
            assert says(told, "max_streams is 2")
            assert told.retry_after == 1.0
        # Any other call, and any other tenant, goes on.
        assert (await both.limited.run(run.run_id)).run_id == run.run_id
        others = [await both.free.stream() for _ in range(5)]
        both.wire.gates.open("g")
        assert (await waiting).state == run_pb2.RUN_STATE_COMPLETED
        first.cancel()
        async with asyncio.timeout(SECONDS):
            while streams.of("limited"):
                await asyncio.sleep(0)
        mine = [await both.limited.stream() for _ in range(2)]
        for call in (*others, *mine):
            call.cancel()


async def test_a_tenant_that_has_stored_too_much_accepts_nothing_until_it_deletes() -> None:
    async with tenants(max_stored_bytes=20_000) as both:
        run = await both.limited.accept("s", script(say("x" * 25_000)), "r")
        await both.limited.ended("r")
        measured = both.wire.coordinator.stored
        await measured.measure()
        told = await refused(both.limited.accept("t", "x"))
        assert says(told, "max_stored_bytes is 20000")
        assert told.retry_after is None
        assert await both.limited.accept("s", script(say("x" * 25_000)), "r") != run  # as it is now
        await both.free.accept("s", script(say("x" * 30_000)))
        await both.limited.delete("s")
        await measured.measure()
        await both.limited.accept("t", "x")


async def test_what_was_accepted_since_the_last_measurement_counts() -> None:
    async with tenants(Limits(max_active_runs=0), max_stored_bytes=10_000) as both:
        await both.limited.accept("s", "x" * 9_600)
        assert says(await refused(both.limited.accept("t", "x")), "max_stored_bytes is 10000")


@pytest.mark.parametrize(
    "quota",
    [
        {"max_waiting_runs": 0},
        {"max_stored_bytes": 0},
        {"accepts_per_second": 0.001, "accepts_burst": 1},
    ],
)
async def test_a_quota_that_is_taken_away_holds_nobody_any_more(quota: dict[str, Any]) -> None:
    async with tenants(Limits(max_active_runs=0), **quota) as both:
        if "accepts_burst" in quota:
            await both.limited.accept("s", "x")
        assert (await refused(both.limited.accept("s", "x"))).reason == "QUOTA_EXCEEDED"
        both.book.replace(Quotas())
        await both.limited.accept("s", "x")


async def test_all_other_tenants_have_a_quota_each() -> None:
    async with tenants(Limits(max_active_runs=0)) as both:
        both.book.replace(Quotas({"free": Quota()}, others=Quota(max_waiting_runs=1)))
        another = Somebody(both.wire, "another")
        for caller in (both.limited, another):
            await caller.accept("s", "x")
            assert (await refused(caller.accept("s", "x"))).reason == "QUOTA_EXCEEDED"
        for _ in range(3):
            await both.free.accept("s", "x")
