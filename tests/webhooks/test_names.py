"""Names of hosts, some of whose name servers never answer."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from runlane_server.store.memory.store import MemoryStore
from runlane_server.webhooks import attempts as attempts_module
from runlane_server.webhooks import names as names_module
from runlane_server.webhooks.names import LOOKUPS_OF_TENANT, Names, NamesBusy
from runlane_server.webhooks.sender import DeliveryFailed, Sender
from support.deliveries import LOCAL, delivering
from support.endpoint import endpoint
from support.story import TENANT, Story


@dataclass
class NameServers:
    """The resolver of the system. Those of `*.hangs` answer once `opened` is set."""

    opened: threading.Event = field(default_factory=threading.Event)
    asked: list[str] = field(default_factory=list)

    def look_up(self, host: str, port: Any, *, flags: int = 0, **more: Any) -> Any:
        if flags & socket.AI_NUMERICHOST:
            return REAL(host, port, flags=flags, **more)
        self.asked.append(host)
        host.encode("idna")  # as the real one does
        if host.endswith(".hangs"):
            self.opened.wait(30)
        if host.endswith(".missing"):
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return REAL("127.0.0.1", port, **more)


REAL = socket.getaddrinfo


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[NameServers]:
    servers = NameServers()
    monkeypatch.setattr(socket, "getaddrinfo", servers.look_up)
    monkeypatch.setattr(names_module, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(names_module, "SLOW_SECONDS", 60.0)
    yield servers
    servers.opened.set()


@pytest.fixture
def names(servers: NameServers) -> Iterator[Names]:
    names = Names()
    yield names
    servers.opened.set()
    names.close()


async def hang(
    names: Names, servers: NameServers, tenant: str, count: int = LOOKUPS_OF_TENANT
) -> list[asyncio.Task[Any]]:
    """Takes threads, by default every one that a tenant may hold."""
    before = len(servers.asked)
    tasks = [asyncio.create_task(names.addresses(f"{n}.hangs", tenant)) for n in range(count)]
    async with asyncio.timeout(10):
        while len(servers.asked) < before + count:
            await asyncio.sleep(0)
    return tasks


async def test_r55_a_tenant_whose_names_hang_delays_no_other_tenant(
    names: Names, servers: NameServers
) -> None:
    tasks = [asyncio.create_task(names.addresses(f"{n}.hangs", "bad")) for n in range(100)]
    async with asyncio.timeout(10):
        while len(servers.asked) < LOOKUPS_OF_TENANT:
            await asyncio.sleep(0)
    done, hanging = await asyncio.wait(tasks, timeout=0.5)
    assert (len(hanging), len(servers.asked)) == (LOOKUPS_OF_TENANT, LOOKUPS_OF_TENANT)
    assert all(isinstance(task.exception(), NamesBusy) for task in done)
    assert await names.addresses("good.example", "good") == ("127.0.0.1",)
    servers.opened.set()
    await asyncio.wait(hanging)
    assert await names.addresses("good.example", "bad") == ("127.0.0.1",)


async def test_r55_tenants_whose_names_hang_together_leave_threads_for_others(
    names: Names, servers: NameServers
) -> None:
    tenants = [f"bad{n}" for n in range(names_module.RESOLVERS // LOOKUPS_OF_TENANT)]
    tasks = [
        asyncio.create_task(names.addresses(f"{n}.hangs", tenant))
        for tenant in tenants
        for n in range(10)
    ]
    await asyncio.wait(tasks, timeout=0.5)
    assert all(names.shares.held[tenant] for tenant in tenants)
    for n in range(5):
        assert await names.addresses("good.example", f"good{n}") == ("127.0.0.1",)
    servers.opened.set()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _hang_again_and_again(names: Names, tenant: str) -> None:
    while True:
        # As a delivery does, it waits no longer; the thread does.
        with suppress(NamesBusy, TimeoutError):
            async with asyncio.timeout(0.2):
                await names.addresses("x.hangs", tenant)


async def test_r55_colluding_tenants_leave_threads_for_one_that_never_hung(
    names: Names, servers: NameServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are more of them than threads, and each asks again as soon as it is refused."""
    monkeypatch.setattr(names_module, "SLOW_SECONDS", 0.05)
    monkeypatch.setattr(names_module, "WAIT_SECONDS", 5.0)
    tenants = [f"bad{n}" for n in range(3 * names_module.RESOLVERS)]
    hanging = [
        asyncio.create_task(_hang_again_and_again(names, tenant))
        for tenant in tenants
        for _ in range(LOOKUPS_OF_TENANT)
    ]
    async with asyncio.timeout(10):
        while not all(names.backoffs.holds(tenant) for tenant in tenants):
            await asyncio.sleep(0.01)
    for n in range(5):
        assert await names.addresses("good.example", f"good{n}") == ("127.0.0.1",)
    # All of them together have the places of slow tenants now.
    async with asyncio.timeout(10):
        while names.shares.free < names_module.RESOLVERS or names.slow_shares.free:
            await asyncio.sleep(0.01)
    assert names.hanging <= len(tenants) * LOOKUPS_OF_TENANT
    for task in hanging:
        task.cancel()
    await asyncio.wait(hanging)
    servers.opened.set()
    async with asyncio.timeout(10):
        while names.hanging or names.slow_shares.free < names_module.SLOW_RESOLVERS:
            await asyncio.sleep(0.01)


async def test_r55_lookups_that_hang_are_limited(
    names: Names, servers: NameServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names_module, "SLOW_SECONDS", 0.01)
    monkeypatch.setattr(names_module, "MAX_HANGING", 3)
    hanging = [task for n in range(5) for task in await hang(names, servers, f"bad{n}", 1)]
    async with asyncio.timeout(10):
        while not names.backoffs.holds("bad4"):
            await asyncio.sleep(0.01)
    assert names.hanging == 3
    assert names.shares.free == names_module.RESOLVERS - 2
    servers.opened.set()
    await asyncio.wait(hanging)
    assert (names.hanging, names.shares.free) == (0, names_module.RESOLVERS)


async def test_r55_a_tenant_that_hangs_again_backs_off_for_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    now = [0.0]
    monkeypatch.setattr(loop, "time", lambda: now[0])
    backoffs = names_module.Backoffs()
    for seconds in (60, 120, 240, 480, 960, 1920, 3600, 3600):
        backoffs.add("bad")
        backoffs.add("bad")
        now[0] += seconds - 1
        assert backoffs.holds("bad")
        now[0] += 1
        assert not backoffs.holds("bad")
    now[0] += 3600
    backoffs.add("other")
    backoffs.add("bad")
    now[0] += 60
    assert not backoffs.holds("bad")


async def test_r55_a_lookup_counts_until_its_thread_returns(
    names: Names, servers: NameServers
) -> None:
    """The caller may be gone long before."""
    for task in await hang(names, servers, "t"):
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
    with pytest.raises(NamesBusy, match="busy"):
        await names.addresses("more.hangs", "t")
    assert len(servers.asked) == LOOKUPS_OF_TENANT
    servers.opened.set()
    async with asyncio.timeout(10):
        while names.shares.free < names_module.RESOLVERS:
            await asyncio.sleep(0)
    assert await names.addresses("0.missing", "t") == ()


@pytest.mark.usefixtures("servers")
async def test_nothing_is_kept_of_a_tenant_that_resolves_no_name(names: Names) -> None:
    for n in range(20):
        await names.addresses("good.example", f"t{n}")
    assert not names.shares.held


async def test_all_threads_are_free_again_after_many_waited_in_vain(
    servers: NameServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names_module, "RESOLVERS", 2)
    names = Names()
    hanging = [task for n in range(2) for task in await hang(names, servers, f"bad{n}", 1)]
    for _ in range(4):
        with pytest.raises(NamesBusy):
            await names.addresses("good.example", "good")
    servers.opened.set()
    await asyncio.wait(hanging)
    assert await names.addresses("good.example", "good") == ("127.0.0.1",)
    names.close()


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "2130706433", "0x7f000001", "127.1", "::1", "2606:4700::1111"]
)
async def test_r55_an_address_needs_no_thread(
    names: Names, servers: NameServers, host: str
) -> None:
    await hang(names, servers, "t")
    assert len(await names.addresses(host, "t")) == 1
    assert len(servers.asked) == LOOKUPS_OF_TENANT


@pytest.mark.parametrize("host", ["a.missing", "x" * 64 + ".example", "a..b"])
async def test_a_name_that_cannot_be_resolved_fails_the_delivery(
    servers: NameServers, host: str
) -> None:
    sender = Sender(LOCAL)
    with pytest.raises(DeliveryFailed, match="cannot be resolved"):
        await sender.post(f"http://{host}/", {}, b"{}", tenant="t")
    sender.close()


async def test_r55_a_connection_goes_to_the_address_that_was_checked(
    servers: NameServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that resolves to another address a moment later gains nothing by it."""
    found = iter(("127.0.0.1", "127.0.0.2", "127.0.0.3"))

    def rebinding(host: str, port: Any, **more: Any) -> Any:
        if host != "rebinds.example":
            return servers.look_up(host, port, **more)
        servers.asked.append(host)
        return REAL(next(found), port, **more)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    sender = Sender(LOCAL)
    async with endpoint() as served:  # on 127.0.0.1 only
        url = f"http://rebinds.example:{served.port}/"
        message = b'{"type": "x", "data": {}}'
        for _ in range(2):  # the second one over the same connection
            assert (await sender.post(url, {}, message, tenant="t")).status == 200
    assert servers.asked == ["rebinds.example"]
    sender.close()


async def test_r55_busy_name_resolution_is_no_failure_of_the_endpoint(
    servers: NameServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts_module, "BUSY_SECONDS", 0.01)
    async with MemoryStore() as store, delivering(store) as node, endpoint() as served:
        names = node.parts.sender._names
        hanging = await hang(names, servers, TENANT)
        webhook = await node.create(f"http://good.example:{served.port}/")
        await Story(store, "s").play("a")
        found = await node.until(webhook, lambda it: bool(it.progress.last_error))
        assert found.progress.last_error == "name resolution is busy"
        assert (found.progress.failures, node.parts.counts.failed) == (0, 0)
        servers.opened.set()
        await asyncio.wait(hanging)
        await served.until(lambda: served.run_ids() == ["a"])
        found = await node.current(webhook)
        assert (found.progress.failures, found.progress.held) == (0, ())
