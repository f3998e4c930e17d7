"""Tenants share what deliveries need, and none takes it from the others (R55)."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from runlane_server.store.memory.store import MemoryStore
from runlane_server.store.webhooks import WebhookFilter
from runlane_server.webhooks.attempts import OF_ALL, OF_TENANT
from runlane_server.webhooks.shares import Shares
from support.deliveries import delivering
from support.endpoint import endpoint
from support.story import Story


async def settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def take(shares: Shares, tenant: str, count: int) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(shares.acquire(tenant)) for _ in range(count)]
    await settle()
    return tasks


async def take_one(shares: Shares, tenant: str) -> None:
    async with asyncio.timeout(1):
        await shares.acquire(tenant)


async def end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_one_tenant_has_its_most() -> None:
    shares = Shares(OF_ALL, OF_TENANT)
    tasks = await take(shares, "a", 200)
    assert shares.held == {"a": OF_TENANT}
    await end(tasks)


async def test_tenants_together_leave_places_for_others() -> None:
    shares = Shares(OF_ALL, OF_TENANT)
    tasks = [task for n in range(30) for task in await take(shares, f"t{n}", 100)]
    assert shares.free > 4
    assert min(shares.held.values()) >= 1
    await asyncio.gather(*(take_one(shares, f"new{n}") for n in range(4)))
    await end(tasks)


async def test_the_tenant_that_holds_least_comes_next() -> None:
    shares = Shares(16, 8)
    many = [*await take(shares, "a", 9)]
    assert shares.held == {"a": 3}
    many += [task for n in range(13) for task in await take(shares, f"t{n}", 1)]
    assert shares.free == 0
    late = await take(shares, "late", 1)
    shares.release("a")
    await settle()
    assert late[0].done()
    assert shares.held["a"] == 2
    await end(many)


STEPS = st.tuples(st.sampled_from("abc"), st.sampled_from(["take", "release", "cancel"]))


@given(st.lists(st.lists(STEPS, min_size=1, max_size=6)))
def test_no_place_is_lost_or_given_twice(ticks: list[list[tuple[str, str]]]) -> None:
    """The steps of a tick happen before any of the tasks sees one of them."""

    async def play() -> None:
        shares = Shares(6, 3)
        waiting: dict[str, list[asyncio.Task[None]]] = {name: [] for name in "abc"}
        held: Counter[str] = Counter()
        for tick in ticks:
            cancelled = []
            for name, step in tick:
                if step == "take":
                    waiting[name].append(asyncio.create_task(shares.acquire(name)))
                elif step == "cancel" and waiting[name]:
                    cancelled.append((name, waiting[name].pop(0)))
                    cancelled[-1][1].cancel()
                elif step == "release" and held[name]:
                    held[name] -= 1
                    shares.release(name)
            await settle()
            assert all(task.cancelled() for _, task in cancelled)
            for tenant, tasks in waiting.items():
                done = [task for task in tasks if task.done()]
                assert not any(task.result() for task in done)
                held[tenant] += len(done)
                waiting[tenant] = [task for task in tasks if not task.done()]
            assert +held == shares.held
            assert shares.free + held.total() == 6
            assert max(held.values(), default=0) <= 3
            idle = [tenant for tenant, tasks in waiting.items() if tasks and not held[tenant]]
            assert not (idle and shares.free)
        await end([task for tasks in waiting.values() for task in tasks])
        for tenant, count in held.items():
            for _ in range(count):
                shares.release(tenant)
        assert (shares.free, shares.held) == (6, {})

    asyncio.run(play())


async def hold(shares: Shares, tenant: str) -> None:
    async with shares.taken(tenant):
        await asyncio.Event().wait()


async def test_those_that_hold_and_those_that_wait_are_cancelled_together() -> None:
    shares = Shares(64, 2)
    for _ in range(3):
        tasks = [asyncio.create_task(hold(shares, "a")) for _ in range(4)]
        await settle()
        assert shares.held == {"a": 2}
        await end(tasks)
        assert all(task.cancelled() for task in tasks)
        assert (shares.free, shares.held) == (64, {})


async def test_one_that_waits_behind_a_cancelled_one_gets_the_place() -> None:
    shares = Shares(1, 1)
    await take_one(shares, "a")
    first, second, other = [*await take(shares, "a", 2), *await take(shares, "b", 1)]
    first.cancel()
    other.cancel()
    shares.release("a")
    await settle()
    assert second.done()
    assert not second.cancelled()
    assert (shares.free, shares.held) == (0, {"a": 1})


async def test_r55_colluding_tenants_do_not_hold_up_a_neighbour() -> None:
    """Sixteen tenants, each with more deliveries to an endpoint that hangs than it may have."""
    tenants = [f"bad{n}" for n in range(OF_ALL // OF_TENANT)]
    async with MemoryStore() as store, delivering(store) as node, endpoint() as bad:
        bad.gate.clear()
        for tenant in tenants:
            for _ in range(OF_TENANT // 16 + 1):
                await node.webhooks.create(
                    tenant, url=bad.url, secret="", wanted=WebhookFilter(), full=False, enabled=True
                )
            for n in range(16):
                await Story(store, f"s{n}", tenant=tenant).play(f"r{n}")
        async with endpoint() as good:
            await bad.until(lambda: bad.in_flight >= OF_ALL // 2)
            await node.create(good.url)
            began = time.monotonic()
            await Story(store, "s").play("mine")
            await good.until(lambda: good.run_ids() == ["mine"])
            assert time.monotonic() - began < 10  # an endpoint that hangs holds its place for 15 s
            assert node.parts.slots.free
        bad.gate.set()


async def test_r55_changes_of_webhooks_that_hang_lose_no_place() -> None:
    async with MemoryStore() as store, delivering(store) as node, endpoint() as bad:
        bad.gate.clear()
        hooks = [await node.create(bad.url) for _ in range(8)]
        for n in range(16):
            await Story(store, f"s{n}").play(f"r{n}")
        for revision in range(2, 5):
            await bad.until(lambda: node.parts.slots.held.total() == OF_TENANT)
            for hook in hooks:
                await node.webhooks.rotate(hook.key, "", expire_now=True)
            for hook in hooks:
                await node.delivers_revision(hook, revision)
        await bad.until(lambda: node.parts.slots.held.total() == OF_TENANT)
        for hook in hooks:
            await node.webhooks.delete(hook.key)
        await bad.until(lambda: not node.dispatcher.deliveries)
        assert (node.parts.slots.free, node.parts.slots.held) == (OF_ALL, {})
        bad.gate.set()
        async with endpoint() as good:
            await node.create(good.url)
            await Story(store, "s").play("mine")
            await good.until(lambda: good.run_ids() == ["mine"])
