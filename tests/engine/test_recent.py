"""Recently used lanes and prompts are not read from the store again."""

from __future__ import annotations

from runlane_server.core.limits import Limits
from runlane_server.core.model import Prompt, RunKey, RunState, SessionKey
from runlane_server.core.recent import RecentItems
from runlane_server.core.transition import Lane, Transition
from runlane_server.store.memory.store import MemoryStore
from support.node import running


class Counting(MemoryStore):
    """A store that counts reads of lanes and prompts, and commits."""

    def __init__(self) -> None:
        super().__init__()
        self.lanes = 0
        self.prompts = 0
        self.commits = 0

    async def commit(self, base_version: int, transition: Transition) -> int:
        self.commits += 1
        return await super().commit(base_version, transition)

    async def load_lane(self, key: SessionKey) -> Lane:
        self.lanes += 1
        return await super().load_lane(key)

    async def get_prompt(self, key: RunKey) -> Prompt | None:
        self.prompts += 1
        return await super().get_prompt(key)


def test_a_full_cache_evicts_the_oldest_item() -> None:
    recent: RecentItems[str, int] = RecentItems(2)
    for n, key in enumerate("abac"):
        recent.put(key, n)
    assert [recent.take(key) for key in "abcc"] == [2, None, 3, None]
    assert len(recent) == 0


async def test_the_next_run_of_a_recent_session_reads_no_lane() -> None:
    async with Counting() as store, running(store) as node:
        await node.coordinator.run("s", Prompt("a"))
        read = store.lanes
        await node.coordinator.run("s", Prompt("b"))
        assert (store.lanes, store.prompts) == (read, 0)


async def test_the_prompt_of_a_run_that_waits_for_a_slot_is_not_read() -> None:
    async with Counting() as store, running(store, limits=Limits(max_active_runs=1)) as node:
        await node.start_blocked("first", "g")
        run = await node.queue("second", "x")
        read = store.lanes
        node.latches.open("g")
        assert (await node.end(run.run_id)).state is RunState.COMPLETED
        assert (store.lanes, store.prompts) == (read, 0)


async def test_a_large_waiting_prompt_is_not_cached() -> None:
    async with Counting() as store, running(store) as node:
        await node.start_blocked("s", "g")
        run = await node.queue("s", "x" * 10_000)
        node.latches.open("g")
        assert len((await node.end(run.run_id)).text) == 10_000
        assert store.prompts == 1


async def test_a_deleted_session_is_not_cached() -> None:
    async with Counting() as store, running(store) as node:
        await node.coordinator.run("s", Prompt("a"))
        await node.coordinator.sessions.delete("s")
        assert (await node.coordinator.run("s", Prompt("b"))).accept_seq == 1
