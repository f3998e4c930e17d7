"""The limits of a node, and the errors beyond them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from runlane_server.core.errors import (
    Draining,
    Overloaded,
    PromptTooLarge,
    QueueFull,
    RunNotFound,
    SessionBusy,
    SessionExists,
    SessionNotFound,
)
from runlane_server.core.limits import Limits
from runlane_server.core.model import Attachment, Prompt, RunRequest, RunState, SessionKey
from runlane_server.store.base import Store
from support.node import Node, running
from support.staging import say, script, wait

pytestmark = pytest.mark.stores("memory", "sqlite")

S = RunState


async def test_an_accept_beyond_the_session_limit_is_refused_and_stores_nothing(
    store: Store,
) -> None:
    async with running(store, limits=Limits(max_waiting_runs=2)) as node:
        await node.start_blocked("s", "g")
        await node.queue("s", "a")
        await node.queue("s", "b")
        with pytest.raises(QueueFull):
            await node.queue("s", "c", run_id="refused")
        with pytest.raises(RunNotFound):
            await node.coordinator.get_run("refused")
        assert await node.coordinator.queued_prompts("s") == 2
        node.latches.open("g")


async def test_with_a_queue_limit_of_zero_an_idle_session_still_runs(store: Store) -> None:
    async with running(store, limits=Limits(max_waiting_runs=0)) as node:
        assert (await node.coordinator.run("s", Prompt("x"))).state is S.COMPLETED
        await node.start_blocked("s", "g")
        with pytest.raises(QueueFull):
            await node.queue("s", "x")


async def test_an_accept_beyond_the_node_limit_is_overloaded_with_retry_after(
    store: Store,
) -> None:
    async with running(store, limits=Limits(max_active_runs=0, max_waiting_total=3)) as node:
        for n in range(3):
            await node.queue(f"s{n}", "x")
        with pytest.raises(Overloaded) as refused:
            await node.queue("s3", "x")
        assert refused.value.retry_after == 1.0
        await node.coordinator.cancel("s0")
        await node.queue("s3", "x")


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (Prompt("é" * 6), "prompt"),
        (Prompt("x", (Attachment("a", "", b"123"), Attachment("b", "", "456"))), "attachments"),
    ],
)
async def test_an_oversized_prompt_or_attachment_is_refused_by_field(
    store: Store, prompt: Prompt, field: str
) -> None:
    limits = Limits(max_prompt_bytes=11, max_attachment_bytes=5)
    async with running(store, limits=limits) as node:
        accepted = node.coordinator.begin_accepted("s", "r")
        request = RunRequest("r", prompt)
        with pytest.raises(PromptTooLarge) as refused:
            await node.coordinator.run_accepted(accepted, request, allow_missing=True)
        assert [violation.field for violation in refused.value.violations] == [field]


async def test_runs_beyond_the_slots_wait_and_the_oldest_session_starts_first(store: Store) -> None:
    async with running(store, limits=Limits(max_active_runs=2)) as node:
        await node.start_blocked("a", "a")
        await node.start_blocked("b", "b")
        waiting = [await node.queue(f"w{n}", str(n)) for n in range(5)]
        assert [await node.state(run.run_id) for run in waiting] == [S.ACCEPTED] * 5
        node.latches.open("a")
        for run in waiting:
            await node.end(run.run_id)
        order = [complete.session_id for complete in await node.completes()]
        assert order == ["a", *(f"w{n}" for n in range(5))]
        node.latches.open("b")


async def test_a_session_with_a_long_queue_releases_its_slot_to_other_sessions(
    store: Store,
) -> None:
    async with running(store, limits=Limits(max_active_runs=1)) as node:
        await node.start_blocked("greedy", "g")
        greedy = [await node.queue("greedy", str(n)) for n in range(10)]
        modest = await node.queue("modest", "x")
        node.latches.open("g")
        await node.end(greedy[-1].run_id)
        order = [complete.run_id for complete in await node.completes()]
        assert order.index(modest.run_id) == 1


async def test_a_draining_node_refuses_new_runs_and_finishes_active_ones(store: Store) -> None:
    async with running(store) as node:
        active = await node.accept("s", script(wait("g"), say("done")))
        await node.latches.reached("g")
        queued = await node.queue("s", "x")
        node.coordinator.begin_drain()
        with pytest.raises(Draining):
            await node.queue("t", "x")
        assert not await node.coordinator.wait_idle(0)
        node.latches.open("g")
        assert await node.coordinator.wait_idle(10)
        assert (await node.end(active.run.run_id)).text == "done"
        assert await node.state(queued.run_id) is S.ACCEPTED


async def test_a_session_is_created_once_and_deleted_only_when_idle(node: Node) -> None:
    created = await node.coordinator.sessions.create("s", title="t", metadata={"k": "v"})
    assert await node.store.get_session(SessionKey("default", "s")) == created
    with pytest.raises(SessionExists):
        await node.coordinator.sessions.create("s")
    run = await node.start_blocked("s", "g")
    with pytest.raises(SessionBusy):
        await node.coordinator.sessions.delete("s")
    node.latches.open("g")
    await node.end(run.run_id)
    await node.coordinator.sessions.delete("s")
    for gone in (
        node.coordinator.sessions.delete("s"),
        node.coordinator.cancel("s"),
        node.accept("s", "x", allow_missing=False),
    ):
        with pytest.raises(SessionNotFound):
            await gone
    with pytest.raises(RunNotFound):
        await node.coordinator.get_run(run.run_id)
    assert [complete.run_id for complete in await node.completes()] == [run.run_id]
    again = await node.queue("s", "again")
    assert again.accept_seq == 1


async def test_a_slow_store_pauses_the_agent_and_loses_no_output(node: Node) -> None:
    """More text than the outbox holds, in deltas of all sizes: the agent is paused, not cut off."""
    steps: list[dict[str, Any]] = [
        {"text": "x" * 1000, "repeat": 3000},
        {"text": "y" * 300_000},
        {"text": "z"},
    ]
    run = (await node.accept("s", script(*steps))).run
    complete = await node.end(run.run_id)
    assert complete.text_truncated
    said = "".join(
        getattr(event.body, "text", "") for event in (await node.events(run.run_id))[:-1]
    )
    assert said == "x" * 3_000_000 + "y" * 300_000 + "z"
    assert (await node.lines("s"))[-1] == f"assistant: {said} [stop]"


async def test_tenants_do_not_see_each_other(node: Node) -> None:
    coordinator = node.coordinator
    await coordinator.run("s", Prompt("x"), tenant="a")
    with pytest.raises(SessionNotFound):
        await coordinator.cancel("s", tenant="b")
    blocked = asyncio.create_task(coordinator.run("t", Prompt(script(wait("g"))), tenant="a"))
    await node.latches.reached("g")
    assert await coordinator.cancel_all(tenant="b") == ()
    assert not await coordinator.is_session_busy("t", tenant="b")
    node.latches.open("g")
    assert (await blocked).state is S.COMPLETED
