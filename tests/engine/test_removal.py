"""The answers of a coordinator while a deleted session is being removed."""

from __future__ import annotations

import asyncio

import pytest

from runlane_server.access.caller import DEFAULT_TENANT
from runlane_server.core.errors import (
    RunDeleted,
    RunIdConflict,
    SessionBeingDeleted,
    SessionNotFound,
)
from runlane_server.core.model import SessionKey
from runlane_server.core.transition import Lane
from runlane_server.engine import retention
from runlane_server.store.memory.store import MemoryStore
from support.node import Node, running
from support.staging import SECONDS, say, script

PROMPT = script(say("x"))


async def play(node: Node, run_id: str, session_id: str = "s") -> None:
    await node.accept(session_id, PROMPT, run_id=run_id)
    await node.end(run_id)


async def test_r03_id_of_a_session_being_removed_is_refused_where_it_would_create_one() -> None:
    store = MemoryStore()
    store._tables.piece_runs = 1
    key = SessionKey(DEFAULT_TENANT, "s")
    async with running(store) as node:
        sessions = node.coordinator.sessions
        for name in ("a", "b", "c"):
            await play(node, name)
        await play(node, "other", "other")
        await sessions.delete("s")
        assert sessions.deleted.is_set()
        assert await store.load_lane(key) == Lane(key, is_being_removed=True)

        with pytest.raises(SessionNotFound):
            await sessions.delete("s")
        with pytest.raises(SessionNotFound):
            await node.coordinator.cancel("s")
        with pytest.raises(SessionNotFound):
            await node.accept("s", PROMPT, allow_missing=False)
        for _ in range(2):  # the second time the lane is in the cache
            with pytest.raises(SessionBeingDeleted) as refused:
                await node.accept("s", PROMPT)
            assert refused.value.retry_after
        with pytest.raises(SessionBeingDeleted):
            await sessions.create("s")
        with pytest.raises(SessionBeingDeleted):
            await sessions.fork("other", "s")
        for name in ("a", "c"):  # a run that is still to be removed, and one that is gone
            with pytest.raises(RunDeleted):
                await node.accept("s", PROMPT, run_id=name)
            with pytest.raises(RunIdConflict):
                await node.accept("other", PROMPT, run_id=name)

        # A begun accept keeps the lane in memory, where it has to be read again.
        with node.coordinator.begin_accepted("s"):
            with pytest.raises(SessionBeingDeleted):
                await node.accept("s", PROMPT)
            while await store.remove_deleted():
                pass
            await play(node, "first")
        with pytest.raises(RunDeleted):
            await node.accept("s", PROMPT, run_id="a")
        await play(node, "new")
        assert (await store.load_lane(key)).accept_seq == 2


async def test_delete_wakes_the_background_removal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "REMOVAL_PAUSE", 3_600.0)
    store = MemoryStore()
    store._tables.piece_runs = 1
    async with running(store) as node:
        for name in ("a", "b", "c"):
            await play(node, name)
        work = retention.retention_tasks(node.coordinator, retention.Retention())
        tasks = [asyncio.create_task(it) for it in work]
        try:
            await asyncio.sleep(0)  # each has found nothing, and pauses
            await node.coordinator.sessions.delete("s")
            async with asyncio.timeout(SECONDS):
                while (await store.load_lane(SessionKey(DEFAULT_TENANT, "s"))).is_being_removed:
                    await asyncio.sleep(0)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
    assert not any(task.exception() for task in tasks if not task.cancelled())
