"""What was used a moment ago is not read from the store again."""

from __future__ import annotations

from runlane_server.core.limits import Limits
from runlane_server.core.model import Prompt, RunKey, RunState, SessionKey
from runlane_server.core.recent import RecentItems
from runlane_server.core.transition import Lane, Transition
from runlane_server.store.memory.store import MemoryStore
from support.node import running


class Counting(MemoryStore):
    """Counts what is read of lanes and prompts, and how often lanes are written."""

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


def test_the_oldest_goes_first() -> None:
    recent: RecentItems[str, int] = RecentItems(2)
    for n, key in enumerate("abac"):
        recent.put(key, n)
    assert [recent.take(key) for key in "abcc"] == [2, None, 3, None]
    assert len(recent) == 0


async def test_the_next_prompt_of_a_conversation_reads_no_lane() -> None:
    async with Counting() as store, running(store) as node:
        await node.coordinator.run("s", Prompt("a"))
        read = store.lanes
        await node.coordinator.run("s", Prompt("b"))
        assert (store.lanes, store.prompts) == (read, 0)


async def test_a_run_that_waits_for_a_slot_is_not_read_again() -> None:
    async with Counting() as store, running(store, limits=Limits(max_active_runs=1)) as node:
        await node.blocked("first", "g")
        run = await node.queue("second", "x")
        read = store.lanes
        node.gates.open("g")
        assert (await node.end(run.run_id)).state is RunState.COMPLETED
        assert (store.lanes, store.prompts) == (read, 0)


async def test_a_prompt_that_is_large_is_not_kept_while_it_waits() -> None:
    async with Counting() as store, running(store) as node:
        await node.blocked("s", "g")
        run = await node.queue("s", "x" * 10_000)
        node.gates.open("g")
        assert len((await node.end(run.run_id)).text) == 10_000
        assert store.prompts == 1


async def test_a_session_that_was_deleted_is_not_remembered() -> None:
    async with Counting() as store, running(store) as node:
        await node.coordinator.run("s", Prompt("a"))
        await node.coordinator.delete_session("s")
        assert (await node.coordinator.run("s", Prompt("b"))).accept_seq == 1
