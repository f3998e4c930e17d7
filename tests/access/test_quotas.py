"""Quotas: how they are read, and how they admit accepts and streams."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress

import pytest

from runlane_server.access import stored_bytes
from runlane_server.access.admission import Admission, TokenBucket
from runlane_server.access.caller import Caller, Role
from runlane_server.access.quotas import NO_LIMIT, Quota, QuotaBook, Quotas, read_quotas
from runlane_server.access.stored_bytes import StoredBytes
from runlane_server.access.stream_quota import StreamQuota
from runlane_server.core.errors import QuotaExceeded, StoreUnavailable

SECONDS = 20.0


def test_a_tenant_has_its_own_quota_or_the_quota_of_all_others() -> None:
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
def test_burst_defaults_to_the_accepts_of_one_second(quota: Quota, burst: int) -> None:
    assert quota.burst == burst


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ({"acme": 3}, r"^tenants\.acme: must be a table"),
        ({"": {}}, r'^tenants\."": must be a table of limits'),
        ({"acme": {"max_runs": 3}}, r"^tenants\.acme\.max_runs: is not a known limit"),
        ({"*": {"max_streams": -1}}, r'^tenants\."\*"\.max_streams: .* whole number from 0 '),
        ({"a b": {"max_streams": True}}, r'^tenants\."a b"\.max_streams: '),
        ({"acme": {"max_stored_bytes": 1.5}}, r"^tenants\.acme\.max_stored_bytes: "),
        ({"acme": {"max_waiting_runs": "3"}}, r"^tenants\.acme\.max_waiting_runs: "),
        ({"acme": {"max_active_runs": None}}, r"^tenants\.acme\.max_active_runs: "),
        (
            {"acme": {"accepts_per_second": 0}},
            r"^tenants\.acme\.accepts_per_second: .* from 0.000001 ",
        ),
        ({"acme": {"accepts_per_second": 1e-300}}, r"accepts_per_second: .* from 0.000001"),
        ({"acme": {"accepts_per_second": float("nan")}}, r"accepts_per_second: "),
        ({"acme": {"accepts_per_second": float("inf")}}, r"accepts_per_second: "),
        (
            {"acme": {"accepts_per_second": 1, "accepts_burst": 0}},
            r"accepts_burst: must be a whole number from 1 ",
        ),
        ({"acme": {"accepts_per_second": 10**400}}, r"accepts_per_second: .* to 1000000000"),
        ({"acme": {"max_active_runs": 1 << 31}}, r"max_active_runs: .* to 1000000000"),
        ({"acme": {"accepts_burst": 5}}, r"accepts_burst: requires accepts_per_second"),
    ],
)
def test_an_invalid_limit_is_reported_with_its_key(table: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        read_quotas(table)


def test_listeners_are_called_once_new_quotas_are_in_force() -> None:
    book = QuotaBook()
    seen: list[int | None] = []
    book.listen(lambda: seen.append(book.max_active("acme")))
    assert book.max_active("acme") is None
    book.replace(Quotas({"acme": Quota(max_active_runs=2)}))
    assert seen == [2]


def test_a_bucket_refills_at_its_rate_up_to_its_burst() -> None:
    bucket = TokenBucket(3.0, at=100.0)
    assert [bucket.take(100.0, 0.5, 3) for _ in range(3)] == [0.0] * 3
    assert bucket.take(100.0, 0.5, 3) == 2.0
    assert bucket.take(101.0, 0.5, 3) == 1.0
    assert bucket.take(102.0, 0.5, 3) == 0.0
    assert [bucket.take(1000.0, 0.5, 3) for _ in range(4)] == [0.0, 0.0, 0.0, 2.0]
    assert bucket.take(900.0, 0.5, 3) == 2.0


class FakeStore:
    """A store with a configurable size per tenant."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.measured: list[str] = []
        self.fails = False
        self.answered = asyncio.Event()

    async def stored_bytes(self, tenant: str) -> int:
        """The configured size."""
        self.measured.append(tenant)
        self.answered.set()
        if self.fails:
            raise StoreUnavailable("away")
        return self.bytes[tenant]


def admission(quota: Quota, now: list[float]) -> Admission:
    """The admission of a node where the tenant `a` has a quota."""
    book = QuotaBook(Quotas({"a": quota}))
    return Admission(book, StoredBytes(book, FakeStore()), now=lambda: now[0])


async def test_an_accept_refused_for_another_reason_consumes_no_rate() -> None:
    now = [0.0]
    admission_ = admission(Quota(max_waiting_runs=1, accepts_per_second=1, accepts_burst=1), now)
    assert admission_.refusal("a", waiting=1) is not None
    assert admission_.refusal("a", waiting=0) is None
    refusal = admission_.refusal("a", waiting=0)
    assert refusal is not None
    assert refusal.retry_after == 1.0
    now[0] = 1.0
    assert admission_.refusal("a", waiting=0) is None


async def test_accepts_in_progress_count_as_waiting_until_they_end() -> None:
    admission_ = admission(Quota(max_waiting_runs=3), [0.0])
    admission_.begin("a")
    admission_.begin("a")
    assert admission_.refusal("a", waiting=0) is None
    assert admission_.refusal("a", waiting=1) is not None
    admission_.end("a")
    assert admission_.refusal("a", waiting=1) is None
    assert admission_.refusal("b", waiting=99) is None


async def test_stored_bytes_are_the_last_measurement_plus_later_accepts() -> None:
    store = FakeStore()
    store.bytes["a"] = 100
    book = QuotaBook(Quotas({"a": Quota(max_stored_bytes=1)}, Quota(max_stored_bytes=1)))
    found = StoredBytes(book, store)
    found.add("a", 7)
    assert found.of("a") == 7
    await found.measure()
    assert found.of("a") == 100
    found.add("a", 7)
    assert found.of("a") == 107
    assert found.of("b") == 0
    await found.measure()
    # A tenant with its own quota is always measured, others from their first accept on.
    assert store.measured == ["a", "a", "b"]


async def test_bytes_being_written_outlast_measurements_and_end_with_a_failure() -> None:
    store = FakeStore()
    store.bytes["a"] = 100
    found = StoredBytes(QuotaBook(Quotas({"a": Quota(max_stored_bytes=1)})), store)
    await found.measure()
    with suppress(StoreUnavailable), found.adding("a", 7), found.adding("a", 30):
        assert found.of("a") == 137
        await found.measure()
        assert found.of("a") == 137
        raise StoreUnavailable("away")
    assert found.of("a") == 100
    with found.adding("a", 7):
        await found.measure()
    # Until the next measurement, which sees it.
    assert found.of("a") == 107
    store.bytes["a"] = 107
    await found.measure()
    assert found.of("a") == 107


async def test_an_unlimited_tenant_is_not_measured() -> None:
    store = FakeStore()
    found = StoredBytes(QuotaBook(Quotas({"a": Quota(max_streams=1)})), store)
    found.add("a", 7)
    assert found.of("a") == 0
    await found.measure()
    assert store.measured == []


async def test_a_new_tenant_is_measured_soon_even_after_a_failure() -> None:
    store = FakeStore()
    store.fails = True
    book = QuotaBook(Quotas({}, Quota(max_stored_bytes=1)))
    found = StoredBytes(book, store)
    task = asyncio.create_task(found.keep_measuring())
    async with asyncio.timeout(SECONDS):
        for tenant in ("a", "b"):
            store.answered.clear()
            found.of(tenant)
            await store.answered.wait()
    store.fails = False
    store.bytes["a"] = 5
    store.answered.clear()
    async with asyncio.timeout(SECONDS):
        found.of("c")
        while found.of("a") != 5:
            await store.answered.wait()
            await asyncio.sleep(0)
    assert stored_bytes.PAUSE_SECONDS < SECONDS
    task.cancel()


def test_open_streams_count_except_those_of_other_nodes() -> None:
    streams = StreamQuota(QuotaBook(Quotas({"a": Quota(max_streams=1)})))
    client = Caller("a", Role.READ, "client")
    node = Caller("a", Role.READ, "node", peer=True)
    streams.acquire(client)
    with pytest.raises(QuotaExceeded, match="max_streams is 1"):
        streams.acquire(client)
    streams.acquire(node)
    assert streams.of("a") == 1
    streams.release(node)
    streams.release(client)
    assert streams.of("a") == 0
    streams.acquire(client)
