"""Forks whose creation is sent twice, as the connection was lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from runlane_server.core.model import Origin, SessionKey
from runlane_server.store.base import NewSession, Store
from runlane_server.store.postgres.pool import Pool
from runlane_server.store.postgres.schema import SQL
from support.node import running
from support.postgres import postgres_store, until_blocked
from support.staging import say, script
from support.story import MANY, TENANT, Story

if TYPE_CHECKING:
    from support.postgres import Connection

fetch = Pool._fetch

Sending = Callable[[Pool, str, Sequence[object], str], Awaitable[Sequence[Any]]]


def creating(monkeypatch: pytest.MonkeyPatch, create: Sending) -> None:
    """Has the statement that creates a fork sent in another way."""

    async def send(pool: Pool, query: str, args: Sequence[object], tenant: str) -> Sequence[Any]:
        how = create if query == SQL["create_fork"] else fetch
        return await how(pool, query, args, tenant)

    monkeypatch.setattr(Pool, "_fetch", send)


async def fork(store: Store, story: Story) -> Origin | None:
    """The origin of a fork that is made of a session."""
    plan = await store.plan_copy(story.key, 1)
    assert plan is not None
    made = SessionKey(TENANT, "fork")
    await store.fork_session(plan, NewSession(made, story.tick()))
    session = await store.get_session(made)
    return None if session is None else session.origin


async def test_fork_whose_answer_was_lost_is_there_once(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Sequence[object]] = []

    async def lose(pool: Pool, query: str, args: Sequence[object], tenant: str) -> Sequence[Any]:
        sent.append(args)
        rows = await fetch(pool, query, args, tenant)
        if sent.count(args) == 1:
            raise asyncpg.ConnectionDoesNotExistError("connection was closed")
        return rows

    creating(monkeypatch, lose)
    async with postgres_store(postgres_url) as store, running(store) as node:
        accepted = await node.accept("s", script(say("one")))
        await node.end(accepted.run.run_id)
        assert (await node.coordinator.sessions.fork("s", "fork")).origin == Origin("s", 1)
        assert await node.lines("fork") == await node.lines("s")
        unnamed = await node.coordinator.sessions.fork("s")
        assert len(sent) == 4
        page = await store.list_sessions("default", limit=MANY)
        assert {it.session_id for it in page.items} == {"s", "fork", unnamed.session_id}


async def test_source_may_be_deleted_before_the_repetition(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def twice(pool: Pool, query: str, args: Sequence[object], tenant: str) -> Sequence[Any]:
        await fetch(pool, query, args, tenant)
        await story.remove()
        return await fetch(pool, query, args, tenant)

    creating(monkeypatch, twice)
    async with postgres_store(postgres_url) as store:
        story = Story(store)
        await story.play("r1")
        assert await fork(store, story) == Origin("session", 1)


async def test_repetition_waits_for_a_creation_that_is_still_at_work(
    postgres_url: str, beside: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def beside_it(
        pool: Pool, query: str, args: Sequence[object], tenant: str
    ) -> Sequence[Any]:
        async with beside.transaction():
            await beside.fetch(query, *args)
            again = asyncio.create_task(fetch(pool, query, args, tenant))
            await until_blocked(beside)
        return await again

    creating(monkeypatch, beside_it)
    async with postgres_store(postgres_url) as store:
        story = Story(store)
        await story.play("r1")
        assert await fork(store, story) == Origin("session", 1)
