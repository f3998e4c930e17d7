"""Quotas: how they are read, and how accepts are measured by them."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from runlane_server.access import stored_bytes
from runlane_server.access.admission import Admission, TokenBucket
from runlane_server.access.caller import Caller, Role
from runlane_server.access.quotas import NO_LIMIT, Quota, QuotaBook, Quotas, read_quotas
from runlane_server.access.stored_bytes import StoredBytes
from runlane_server.access.stream_quota import StreamQuota
from runlane_server.core.errors import QuotaExceeded, StoreUnavailable

SECONDS = 20.0


def test_each_tenant_has_its_own_quota_or_that_of_all_others() -> None:
    quotas = read_quotas(
        {
            "acme": {"max_active_runs": 8, "accepts_per_second": 2.5},
            "*": {"max_waiting_runs": 0, "max_streams": 3, "max_stored_bytes": 1 << 40},
            "free": {},
        }
    )
    assert quotas.of("acme") == Quota(max_active_runs=8, accepts_per_second=2.5)
    assert quotas.of("free") == NO_LIMIT
    others = Quota(max_waiting_runs=0, max_streams=3, max_stored_bytes=1 << 40)
    assert quotas.of("anybody") == quotas.of("*") == others
    assert read_quotas({}).of("anybody") == NO_LIMIT


@pytest.mark.parametrize(
    ("quota", "burst"),
    [
        (Quota(accepts_per_second=2.5), 3),
        (Quota(accepts_per_second=0.1), 1),
        (Quota(accepts_per_second=2, accepts_burst=50), 50),
    ],
)
def test_a_burst_is_that_of_a_second_unless_it_is_said(quota: Quota, burst: int) -> None:
    assert quota.burst == burst


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"acme": 3}, r"^tenants\.acme: has to be a table"),
        ({"": {}}, r'^tenants\."": has to be a table of limits'),
        ({"acme": {"max_runs": 3}}, r"^tenants\.acme\.max_runs: there is no such limit"),
        ({"*": {"max_streams": -1}}, r'^tenants\."\*"\.max_streams: .* whole number, 0 or more'),
        ({"a b": {"max_streams": True}}, r'^tenants\."a b"\.max_streams: '),
        ({"acme": {"max_stored_bytes": 1.5}}, r"^tenants\.acme\.max_stored_bytes: "),
        ({"acme": {"max_waiting_runs": "3"}}, r"^tenants\.acme\.max_waiting_runs: "),
        ({"acme": {"max_active_runs": None}}, r"^tenants\.acme\.max_active_runs: "),
        (
            {"acme": {"accepts_per_second": 0}},
            r"^tenants\.acme\.accepts_per_second: .* 0.000001 or more",
        ),
        ({"acme": {"accepts_per_second": 1e-300}}, r"accepts_per_second: .* or more"),
        ({"acme": {"accepts_per_second": float("nan")}}, r"accepts_per_second: "),
        ({"acme": {"accepts_per_second": float("inf")}}, r"accepts_per_second: "),
        ({"acme": {"accepts_per_second": 1, "accepts_burst": 0}}, r"accepts_burst: .* 1 or more"),
        ({"acme": {"accepts_per_second": 10**400}}, r"accepts_per_second: .* at the most"),
        ({"acme": {"max_active_runs": 1 << 31}}, r"max_active_runs: .* at the most"),
        ({"acme": {"accepts_burst": 5}}, r"accepts_burst: goes with accepts_per_second"),
    ],
)
def test_what_is_wrong_is_told_with_its_key(table: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_quotas(table)


def test_who_listens_hears_of_other_quotas_when_they_are_in_force() -> None:
    book = QuotaBook()
    heard: list[int | None] = []
    book.listen(lambda: heard.append(book.max_active("acme")))
    assert book.max_active("acme") is None
    book.replace(Quotas({"acme": Quota(max_active_runs=2)}))
    assert heard == [2]


def test_a_bucket_refills_at_its_rate_and_not_beyond_its_burst() -> None:
    bucket = TokenBucket(3.0, at=100.0)
    assert [bucket.take(100.0, 0.5, 3) for _ in range(3)] == [0.0] * 3
    assert bucket.take(100.0, 0.5, 3) == 2.0
    assert bucket.take(101.0, 0.5, 3) == 1.0
    assert bucket.take(102.0, 0.5, 3) == 0.0
    assert [bucket.take(1000.0, 0.5, 3) for _ in range(4)] == [0.0, 0.0, 0.0, 2.0]
    assert bucket.take(900.0, 0.5, 3) == 2.0


class Scale:
    """A store that says what it is told to."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.asked: list[str] = []
        self.fails = False
        self.answered = asyncio.Event()

    async def stored_bytes(self, tenant: str) -> int:
        """How much a tenant has stored."""
        self.asked.append(tenant)
        self.answered.set()
        if self.fails:
            raise StoreUnavailable("away")
        return self.bytes[tenant]


def accepts(quota: Quota, now: list[float]) -> Admission:
    """Accepts of the tenant `a`, at that time."""
    book = QuotaBook(Quotas({"a": quota}))
    return Admission(book, StoredBytes(book, Scale()), now=lambda: now[0])


async def test_an_accept_that_is_refused_for_another_reason_uses_up_no_rate() -> None:
    now = [0.0]
    guard = accepts(Quota(max_waiting_runs=1, accepts_per_second=1, accepts_burst=1), now)
    assert guard.refusal("a", waiting=1) is not None
    assert guard.refusal("a", waiting=0) is None
    refusal = guard.refusal("a", waiting=0)
    assert refusal is not None
    assert refusal.retry_after == 1.0
    now[0] = 1.0
    assert guard.refusal("a", waiting=0) is None


async def test_accepts_under_way_count_as_waiting_until_they_are_over() -> None:
    guard = accepts(Quota(max_waiting_runs=3), [0.0])
    guard.begin("a")
    guard.begin("a")
    assert guard.refusal("a", waiting=0) is None
    assert guard.refusal("a", waiting=1) is not None
    guard.end("a")
    assert guard.refusal("a", waiting=1) is None
    assert guard.refusal("b", waiting=99) is None


async def test_stored_bytes_are_what_was_measured_and_what_came_since() -> None:
    scale = Scale()
    scale.bytes["a"] = 100
    book = QuotaBook(Quotas({"a": Quota(max_stored_bytes=1)}, Quota(max_stored_bytes=1)))
    found = StoredBytes(book, scale)
    found.add("a", 7)
    assert found.of("a") == 7
    await found.measure()
    assert found.of("a") == 100
    found.add("a", 7)
    assert found.of("a") == 107
    assert found.of("b") == 0
    await found.measure()
    # Who has a quota of its own is measured unasked; the others are once they came.
    assert scale.asked == ["a", "a", "b"]


async def test_what_is_not_limited_is_not_measured() -> None:
    scale = Scale()
    found = StoredBytes(QuotaBook(Quotas({"a": Quota(max_streams=1)})), scale)
    found.add("a", 7)
    assert found.of("a") == 0
    await found.measure()
    assert scale.asked == []


async def test_a_new_tenant_is_measured_soon_also_after_a_failure() -> None:
    scale = Scale()
    scale.fails = True
    book = QuotaBook(Quotas({}, Quota(max_stored_bytes=1)))
    found = StoredBytes(book, scale)
    task = asyncio.create_task(found.keep_measuring())
    async with asyncio.timeout(SECONDS):
        for tenant in ("a", "b"):
            scale.answered.clear()
            found.of(tenant)
            await scale.answered.wait()
    scale.fails = False
    scale.bytes["a"] = 5
    scale.answered.clear()
    async with asyncio.timeout(SECONDS):
        found.of("c")
        while found.of("a") != 5:
            await scale.answered.wait()
            await asyncio.sleep(0)
    assert stored_bytes.PAUSE_SECONDS < SECONDS
    task.cancel()


def test_streams_are_counted_while_they_are_open_but_those_of_nodes_are_not() -> None:
    streams = StreamQuota(QuotaBook(Quotas({"a": Quota(max_streams=1)})))
    somebody = Caller("a", Role.READ, "somebody")
    node = Caller("a", Role.READ, "node", peer=True)
    streams.acquire(somebody)
    with pytest.raises(QuotaExceeded, match="max_streams is 1"):
        streams.acquire(somebody)
    streams.acquire(node)
    assert streams.of("a") == 1
    streams.release(node)
    streams.release(somebody)
    assert streams.of("a") == 0
    streams.acquire(somebody)
