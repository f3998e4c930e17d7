"""If most sessions are new the next one is not looked up; a wrong assumption changes nothing."""

from __future__ import annotations

import asyncio

import pytest

from engine.test_recent import Counting
from runlane_server.access.caller import DEFAULT_TENANT
from runlane_server.core.errors import SessionBusy
from runlane_server.core.limits import Limits
from runlane_server.core.model import Prompt, RunRequest, RunState, SessionKey, WhenBusy
from runlane_server.core.transition import Lane
from runlane_server.engine import lane_cache
from runlane_server.engine.lane_cache import LaneCache, LaneOrigin
from runlane_server.engine.mailbox import Mailbox
from runlane_server.store.base import Store
from runlane_server.store.memory.store import MemoryStore
from support.node import Node, running

MANY = 200
"""Number of new sessions after which the next one is assumed to be new."""


async def _fill(node: Node) -> None:
    for n in range(MANY):
        await node.accept(f"new {n}", "x")


async def test_a_session_is_assumed_new_after_many_new_sessions() -> None:
    async with Counting() as store, running(store, limits=Limits(max_active_runs=0)) as node:
        await _fill(node)
        read = store.lanes
        accepted = await node.accept("one more", "x")
        assert (store.lanes, accepted.run.accept_seq) == (read, 1)


async def test_a_session_is_looked_up_after_many_known_sessions() -> None:
    async with Counting() as store:
        held = Limits(max_active_runs=0)
        async with running(store, limits=held) as node:
            await _fill(node)
        read, wrote = store.lanes, store.commits
        async with running(store, limits=held) as node:
            await _fill(node)
        assert (store.lanes - read, store.commits - wrote) == (MANY, MANY)


async def test_r04_a_session_wrongly_assumed_new_continues_its_accept_seq(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(store) as node:
        await node.coordinator.run("s", Prompt("a"))
    monkeypatch.setattr(lane_cache, "LIKELY", 0.0)
    async with running(store) as node:
        assert (await node.coordinator.run("s", Prompt("b"))).accept_seq == 2
        runs = [await node.accept("s", "c", run_id="c"), await node.accept("s", "c", run_id="c")]
        assert [accepted.run.accept_seq for accepted in runs] == [3, 3]
        await node.end("c")
    async with running(store) as node:
        again = await node.accept("s", "c", run_id="c")
        assert (again.run.accept_seq, again.run.state) == (3, RunState.COMPLETED)
        said = [line for line in await node.lines("s") if line.startswith("user")]
        assert said == ["user: a", "user: b", "user: c"]


async def test_r07_a_session_wrongly_assumed_new_keeps_its_order(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(store, limits=Limits(max_active_runs=0)) as node:
        first = [await node.queue("s", f"{n}") for n in range(3)]
    monkeypatch.setattr(lane_cache, "LIKELY", 0.0)
    async with running(store, limits=Limits(max_active_runs=1)) as node:
        await node.start_blocked("other", "g")
        last = await node.queue("s", "last")
        node.latches.open("g")
        ends = [await node.end(run.run_id) for run in (*first, last)]
        assert [end.state for end in ends] == [RunState.COMPLETED] * 4
        assert ends == sorted(ends, key=lambda end: end.ended_at)


async def test_r10_a_cancel_covers_the_runs_of_a_session_wrongly_assumed_new(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Limits(max_active_runs=0)
    async with running(store, limits=held) as node:
        waits = await node.queue("s", "x")
    monkeypatch.setattr(lane_cache, "LIKELY", 0.0)
    async with running(store, limits=held) as node:
        coordinator = node.coordinator
        with coordinator.begin_accepted("s") as first, coordinator.begin_accepted("s") as second:
            request = RunRequest(second.run_id, Prompt("y"), WhenBusy.REJECT)
            with pytest.raises(SessionBusy):
                await coordinator.run_accepted(second, request, allow_missing=True)
            receipt = await coordinator.cancel("s")
            covered = [run.run_id for run in receipt.cancelled]
        assert covered == [waits.run_id, first.run_id]
        assert (await node.end(waits.run_id)).state is RunState.CANCELLED


async def test_r29_a_burst_on_a_session_wrongly_assumed_new_starts_one_run(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(store) as node:
        await node.coordinator.run("s", Prompt("a"))
    monkeypatch.setattr(lane_cache, "LIKELY", 0.0)
    async with running(store, limits=Limits(max_active_runs=8)) as node:
        burst = await asyncio.gather(*(node.queue("s", f"{n}") for n in range(8)))
        assert sorted(run.accept_seq for run in burst) == list(range(2, 10))
        assert sum(run.state is RunState.ACTIVE for run in burst) <= 1
        for run in burst:
            assert (await node.end(run.run_id)).state is RunState.COMPLETED
    assert not await store.busy_sessions()


async def test_a_lane_that_changes_while_it_is_loaded_is_loaded_again() -> None:
    mailbox, key = Mailbox(), SessionKey(DEFAULT_TENANT, "s")

    class Changing(MemoryStore):
        async def load_lane(self, key: SessionKey) -> Lane:
            lane = await super().load_lane(key)
            mailbox.is_outdated = True  # as `Lanes.invalidate` does
            return lane

    cache = LaneCache(Changing())
    origins = [(await cache.load(key, mailbox, creates=False))[1] for _ in range(2)]
    assert origins == [LaneOrigin.LOADED] * 2
