"""Forks through the coordinator: at which turn, how often, and what agents learn of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from runlane_server.access.caller import DEFAULT_TENANT
from runlane_server.access.quotas import Quota, QuotaBook, Quotas
from runlane_server.agents.base import AgentEvent, Turn
from runlane_server.core.errors import (
    PermissionDenied,
    QuotaExceeded,
    SessionExists,
    SessionNotFound,
    TurnNotFinished,
    TurnNotFound,
)
from runlane_server.core.model import Origin, Session, SessionKey, TextDelta
from runlane_server.engine.agent_table import AgentTable, DeclaredAgent
from runlane_server.engine.forking import MOST_COPIES
from runlane_server.store.base import NewSession, Stale, Store
from runlane_server.store.copies import CopyPlan
from support.node import Node, running
from support.staging import say, script


class Remembering:
    """Says what a session is a fork of."""

    async def start(self) -> None:
        """Does nothing."""

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Answers with the origin, and the number of messages before the turn."""
        origin = turn.origin
        known = "none" if origin is None else f"{origin.session_id} {origin.turn}"
        yield TextDelta(f"{known} {len(await turn.history())}")

    async def close(self) -> None:
        """Does nothing."""


REMEMBERING = AgentTable(
    [DeclaredAgent("default", Remembering()), DeclaredAgent("b", Remembering())]
)


async def ran(node: Node, session_id: str, text: str = "x") -> str:
    accepted = await node.accept(session_id, script(say(text)))
    return (await node.end(accepted.run.run_id)).text


async def test_fork_of_a_busy_session_ends_with_the_last_finished_turn(store: Store) -> None:
    async with running(store) as node:
        for text in ("one", "two"):
            await ran(node, "s", text)
        await node.start_blocked("s", "latch")
        await node.queue("s", "waits")
        made = await node.coordinator.sessions.fork("s", "fork")
        assert (made.origin, made.busy) == (Origin("s", 2), False)
        lines = await node.lines("fork")
        assert [line for line in lines if line.startswith("assistant")] == [
            "assistant: one [stop]",
            "assistant: two [stop]",
        ]
        with pytest.raises(TurnNotFinished):
            await node.coordinator.sessions.fork("s", "no", at_turn=3)
        with pytest.raises(TurnNotFound):
            await node.coordinator.sessions.fork("s", "no", at_turn=4)
        with pytest.raises(SessionNotFound):
            await node.coordinator.sessions.fork("nobody", "no")
        assert await store.get_session(SessionKey(DEFAULT_TENANT, "no")) is None
        # It runs while the source waits.
        assert await ran(node, "fork", "three") == "three"
        node.latches.open("latch")


async def test_repeated_fork_returns_the_first_one(store: Store) -> None:
    async with running(store) as node:
        await ran(node, "s")
        made = await node.coordinator.sessions.fork("s", "fork")
        await ran(node, "s")
        await ran(node, "fork")
        for turn in (0, 1):
            again = await node.coordinator.sessions.fork("s", "fork", at_turn=turn)
            assert (again.origin, again.created_at) == (Origin("s", 1), made.created_at)
        with pytest.raises(SessionExists):
            await node.coordinator.sessions.fork("s", "fork", at_turn=2)
        with pytest.raises(SessionExists):
            await node.coordinator.sessions.fork("fork", "s")
        await node.coordinator.sessions.delete("s")
        # Also after the source was deleted: the answer to the first call may have been lost.
        assert (await node.coordinator.sessions.fork("s", "fork")).origin == Origin("s", 1)
        names = {(await node.coordinator.sessions.fork("fork")).session_id for _ in range(2)}
        assert len(names) == 2


async def test_forks_at_the_same_time_make_one_session(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[CopyPlan] = []
    whole, may_finish = store.fork_session, asyncio.Event()

    async def fork_session(plan: CopyPlan, session: NewSession) -> None:
        copies.append(plan)
        await may_finish.wait()
        await whole(plan, session)

    monkeypatch.setattr(store, "fork_session", fork_session)
    async with running(store) as node:
        await ran(node, "s")
        fork = node.coordinator.sessions.fork
        calls = [asyncio.create_task(fork("s", "fork")) for _ in range(5)]
        # Another request for the same outcome has a copy of its own, which is then not needed.
        calls.append(asyncio.create_task(fork("s", "fork", at_turn=1)))
        while len(copies) < 2:
            await asyncio.sleep(0)
        calls[0].cancel()  # the others do not depend on the caller that came first
        may_finish.set()
        made = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(made[0], asyncio.CancelledError)
        assert len({repr(session) for session in made[1:]}) == 1
        assert len(copies) == 2


async def test_few_copies_are_made_at_a_time_and_tenants_take_turns(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, plan_copy, may_finish = store.fork_session, store.plan_copy, asyncio.Event()
    planned: list[CopyPlan | None] = []
    begun: list[str] = []
    at_work: set[str] = set()
    most = 0

    async def plan_one(key: SessionKey, turn: int) -> CopyPlan | None:
        planned.append(await plan_copy(key, turn))
        return planned[-1]

    async def fork_session(plan: CopyPlan, session: NewSession) -> None:
        nonlocal most
        name = session.key.session_id
        begun.append(name)
        at_work.add(name)
        most = max(most, len(at_work))
        await may_finish.wait()
        at_work.remove(name)
        if name == "1":
            raise Stale.lane()  # it gives its place back too
        await whole(plan, session)

    monkeypatch.setattr(store, "plan_copy", plan_one)
    monkeypatch.setattr(store, "fork_session", fork_session)
    async with running(store) as node:
        for tenant in ("busy", "other"):
            await node.coordinator.sessions.create("s", tenant=tenant)
        calls = []
        for tenant, name in [*(("busy", str(n)) for n in range(8)), ("other", "mine")]:
            fork = node.coordinator.sessions.fork("s", name, tenant=tenant)
            calls.append(asyncio.create_task(fork))
            while len(planned) < len(calls):
                await asyncio.sleep(0)
        may_finish.set()
        made = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(it) for it in made].count(Session) == 8
        assert isinstance(made[1], SessionNotFound)
        assert most == MOST_COPIES
        assert begun.index("mine") <= MOST_COPIES + 1


@pytest.mark.parametrize("fails", [False, True])
async def test_copies_at_work_count_towards_the_quota_unless_they_fail(
    store: Store, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    limit = 100_000
    whole, plan_copy, may_finish = store.fork_session, store.plan_copy, asyncio.Event()
    planned: list[CopyPlan | None] = []

    async def plan_one(key: SessionKey, turn: int) -> CopyPlan | None:
        planned.append(await plan_copy(key, turn))
        return planned[-1]

    async def fork_session(plan: CopyPlan, session: NewSession) -> None:
        await may_finish.wait()
        if fails:
            raise Stale.lane()
        await whole(plan, session)

    quotas = QuotaBook(Quotas(others=Quota(max_stored_bytes=limit)))
    async with running(store, quotas=quotas) as node:
        await ran(node, "s", "x" * 10_000)
        await node.coordinator.stored.measure()
        with monkeypatch.context() as patched:
            patched.setattr(store, "plan_copy", plan_one)
            patched.setattr(store, "fork_session", fork_session)
            calls = []
            for number in range(6):
                fork = node.coordinator.sessions.fork("s", f"f{number}")
                calls.append(asyncio.create_task(fork))
                while len(planned) < len(calls) and not calls[-1].done():
                    await asyncio.sleep(0)
                await node.coordinator.stored.measure()  # it sees no copy yet
            may_finish.set()
            made = await asyncio.gather(*calls, return_exceptions=True)
        expected = SessionNotFound if fails else Session
        assert [type(it) for it in made] == [expected] * 3 + [QuotaExceeded] * 3
        assert await store.stored_bytes(DEFAULT_TENANT) < limit
        for number in range(3 if fails else 0):
            await node.coordinator.sessions.fork("s", f"g{number}")
        with pytest.raises(QuotaExceeded):
            await node.coordinator.sessions.fork("s", "more")


async def test_copy_goes_on_without_its_caller(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, began, may_finish = store.fork_session, asyncio.Event(), asyncio.Event()

    async def fork_session(plan: CopyPlan, session: NewSession) -> None:
        began.set()
        await may_finish.wait()
        await whole(plan, session)

    monkeypatch.setattr(store, "fork_session", fork_session)
    async with running(store) as node:
        await ran(node, "s")
        call = asyncio.create_task(node.coordinator.sessions.fork("s", "fork"))
        await began.wait()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        may_finish.set()
        assert (await node.coordinator.sessions.fork("s", "fork")).origin == Origin("s", 1)


async def test_source_deleted_during_the_copy_is_not_found(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = store.fork_session

    async def fork_session(plan: CopyPlan, session: NewSession) -> None:
        await node.coordinator.sessions.delete("s")
        await whole(plan, session)

    monkeypatch.setattr(store, "fork_session", fork_session)
    async with running(store) as node:
        await ran(node, "s")
        with pytest.raises(SessionNotFound):
            await node.coordinator.sessions.fork("s", "fork")
        assert await store.get_session(SessionKey(DEFAULT_TENANT, "fork")) is None


@pytest.mark.parametrize("before", ["load_lane", "plan_copy"])
async def test_source_replaced_while_it_is_read_is_not_found(
    store: Store, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    read = getattr(store, before)

    async def replaced(*args: Any) -> Any:
        monkeypatch.setattr(store, before, read)
        await node.coordinator.sessions.delete("s")
        await ran(node, "s", "another")
        return await read(*args)

    async with running(store) as node:
        for _ in range(3):
            await ran(node, "s")
        monkeypatch.setattr(store, before, replaced)
        with pytest.raises(SessionNotFound):
            await node.coordinator.sessions.fork("s", "fork")
        assert await store.get_session(SessionKey(DEFAULT_TENANT, "fork")) is None
        assert (await node.coordinator.sessions.fork("s", "fork")).origin == Origin("s", 1)


async def test_agents_learn_the_origin_with_every_turn_of_a_fork(store: Store) -> None:
    async with running(store, agent=REMEMBERING) as node:
        assert [await ran(node, "s") for _ in range(2)] == ["none 0", "none 2"]
        await node.coordinator.sessions.fork("s", "fork", at_turn=1)
        assert [await ran(node, "fork") for _ in range(2)] == ["s 1 2", "s 1 4"]
        await node.coordinator.sessions.fork("fork", "further")
        assert await ran(node, "further") == "fork 3 6"


async def test_fork_keeps_the_agent_if_the_caller_may_use_it(store: Store) -> None:
    async with running(store, agent=REMEMBERING) as node:
        fork = node.coordinator.sessions.fork
        await node.coordinator.sessions.create("s", agent="b", title="t", metadata={"k": "v"})
        made = await fork("s", "fork", allowed_agents=frozenset({"b"}))
        assert (made.agent, made.title, made.metadata) == ("b", "t", {"k": "v"})
        assert made.origin == Origin("s", 0)
        with pytest.raises(PermissionDenied):
            await fork("s", "no", allowed_agents=frozenset({"default"}))
