"""A node recovers its share of the lost runs, and what the other nodes leave."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import pytest

from runlane_server.cluster import failover as failover_module
from runlane_server.cluster.failover import Failover
from runlane_server.store.base import HostedRun
from support.story import Story

pytest.importorskip("asyncpg")

from runlane_server.store.postgres.store import PostgresStore
from support.postgres import postgres_store

RUNS = 20


class Survivor:
    """A node that ends the runs that it is given, but for those that it cannot recover."""

    def __init__(self, store: PostgresStore, name: str, stories: Sequence[Story]) -> None:
        self.name = name
        self.hopeless: set[str] = set()
        self.recovered: list[str] = []
        self.tried: list[str] = []
        self._stories = {story.session_id: story for story in stories}
        self._failover = Failover(store.cluster, self._recover)

    async def recover_all(self) -> None:
        await self._failover.recover_all(self.name)

    async def _recover(self, lost: Sequence[HostedRun]) -> None:
        for run in lost:
            self.tried.append(run.run_id)
            if run.run_id not in self.hopeless:
                await self._stories[run.session.session_id].finish()
                self.recovered.append(run.run_id)


@pytest.fixture
async def store(postgres_url: str) -> AsyncIterator[PostgresStore]:
    async with postgres_store(postgres_url) as store:
        for name in ("a", "b"):
            await store.cluster.join(name, "")
        yield store


@pytest.fixture
async def stories(store: PostgresStore) -> list[Story]:
    """Sessions whose active runs are lost."""
    stories = [Story(store, f"r{n}", now=10 * n) for n in range(RUNS)]
    for story in stories:
        await story.accept(story.session_id)
        await story.start("gone")
    return stories


@pytest.fixture
def survivors(store: PostgresStore, stories: list[Story]) -> list[Survivor]:
    return [Survivor(store, name, stories) for name in ("a", "b")]


async def test_r21_survivors_share_lost_runs(survivors: list[Survivor]) -> None:
    for one in survivors:
        await one.recover_all()
    a, b = (set(one.recovered) for one in survivors)
    assert a
    assert b
    assert not a & b
    assert len(a | b) == RUNS


async def test_r21_node_recovers_what_another_leaves_a_round_later(
    survivors: list[Survivor],
) -> None:
    """The other one is alive, but gets on with nothing."""
    a, _ = survivors
    await a.recover_all()
    share = len(a.recovered)
    assert 0 < share < RUNS
    await a.recover_all()
    assert len(a.recovered) == RUNS


async def test_r21_runs_that_cannot_be_recovered_keep_no_other_lost(
    survivors: list[Survivor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failover_module, "LOST_RUNS", 2)
    a, _ = survivors
    a.hopeless = {f"r{n}" for n in range(10)}
    for _ in range(RUNS):
        await a.recover_all()
    assert sorted(a.recovered) == sorted(f"r{n}" for n in range(10, RUNS))
    a.tried.clear()
    await a.recover_all()
    assert set(a.tried) <= a.hopeless
    assert len(a.tried) <= 2 * len(a.hopeless)
