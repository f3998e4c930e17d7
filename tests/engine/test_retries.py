"""Retry policies (R38): attempts that the agent failed are repeated, in the same place."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from runlane_server.access.caller import DEFAULT_TENANT
from runlane_server.agents.scripted.agent import ScriptedAgent
from runlane_server.core.agents import DEFAULT_AGENT
from runlane_server.core.errors import RunIdConflict
from runlane_server.core.model import (
    CancelScope,
    CustomEvent,
    FinishReason,
    Prompt,
    RunEvent,
    RunRequest,
    RunState,
    SessionKey,
    Started,
    TextDelta,
    WhenBusy,
)
from runlane_server.core.retry import RetryPolicy
from runlane_server.core.transition import Lane, LaneRun
from runlane_server.engine.agent_table import AgentTable, DeclaredAgent
from runlane_server.engine.backoffs import Backoffs
from runlane_server.store.base import Store
from support.node import Node, running
from support.staging import SECONDS, say, script, wait

pytestmark = pytest.mark.stores("memory", "sqlite", "postgresql")

S = RunState

HOUR = 3600 * 1_000_000
QUICK = RetryPolicy((), max_attempts=3, initial_backoff=1000, max_backoff=4000, after_output=True)
LONG = RetryPolicy((), max_attempts=3, initial_backoff=HOUR, max_backoff=HOUR, after_output=True)


def fail(reason: str = "BUSY", **fields: Any) -> dict[str, Any]:
    return {"fail": "try again", "reason": reason, **fields}


async def back_off(node: Node, session: str, policy: RetryPolicy = LONG, *steps: Any) -> str:
    """Accepts a run whose agent fails; returns its id once it waits for its next attempt."""
    accepted = await node.accept(session, script(*steps, fail()), retry=policy)
    run_id = accepted.run.run_id
    async with asyncio.timeout(SECONDS):
        while True:
            run = await node.coordinator.get_run(run_id)
            if (run.attempt, run.state) == (1, S.ACCEPTED):
                return run_id
            await asyncio.sleep(0)


async def test_r38_a_run_whose_backoff_is_over_waits_for_its_agent_without_a_timer() -> None:
    """With one, it would leave and enter the queue of the slots again and again."""
    queued: list[SessionKey] = []
    backoffs = Backoffs(lambda: 1000, queued.append)
    run = LaneRun("r", 1, S.ACCEPTED, WhenBusy.QUEUE, 0, 1, not_before=1000)
    lane = Lane(SessionKey("default", "s"), waiting=(run,))
    backoffs.follow(lane, is_due=True)
    await asyncio.sleep(0)
    assert (list(backoffs.lanes), queued) == ([], [])
    backoffs.follow(lane, is_due=False)
    async with asyncio.timeout(SECONDS):
        while not queued:
            await asyncio.sleep(0)
    assert (list(backoffs.lanes), queued) == ([], [lane.key])


def attempts(events: Any) -> list[int]:
    return [event.body.attempt for event in events if isinstance(event.body, Started)]


async def test_r38_a_failed_attempt_is_repeated_and_begins_anew(store: Store) -> None:
    async with running(store) as node:
        steps = [say("a"), {"custom": {"type": "t"}}, fail(attempts=2), say("b")]
        accepted = await node.accept("s", script(*steps), retry=QUICK)
        complete = await node.end(accepted.run.run_id)
        assert (complete.state, complete.text, complete.attempt) == (S.COMPLETED, "ab", 3)
        events = await node.events(complete.run_id)
        assert attempts(events) == [1, 2, 3]
        said = [event.body for event in events if isinstance(event.body, TextDelta | CustomEvent)]
        assert said == [TextDelta("a"), CustomEvent("t", "null")] * 2 + [
            TextDelta("a"),
            CustomEvent("t", "null"),
            TextDelta("b"),
        ]
        assert [event.index for event in events] == list(range(1, len(events) + 1))
        assert [line.split(":")[0] for line in await node.lines("s")] == ["user", "assistant"]


async def test_r38_the_last_failure_ends_the_run(store: Store) -> None:
    async with running(store) as node:
        accepted = await node.accept("s", script(say("x"), fail()), retry=QUICK)
        complete = await node.end(accepted.run.run_id)
        assert (complete.state, complete.attempt, complete.text) == (S.FAILED, 3, "x")
        assert complete.error is not None
        assert complete.error.reason == "BUSY"
        assert len(await node.lines("s")) == 2


@pytest.mark.parametrize(
    ("policy", "steps", "expected"),
    [
        (RetryPolicy(("BUSY",), 2, 0), [fail("BUSY")], 2),
        (RetryPolicy(("BUSY", "OTHER"), 2, 0), [fail("OTHER")], 2),
        (RetryPolicy(("BUSY",), 2, 0), [fail("OTHER")], 1),
        (RetryPolicy((), 2, 0), [{"crash": "oh"}], 2),
        (RetryPolicy((), 2, 0), [fail("OUTPUT_LIMIT")], 1),
        (RetryPolicy(("OUTPUT_LIMIT",), 2, 0), [fail("OUTPUT_LIMIT")], 2),
        (RetryPolicy((), 2, 0), [say("x"), fail()], 1),
        (RetryPolicy((), 2, 0), [{"reasoning": "x"}, fail()], 1),
        (RetryPolicy((), 2, 0), [{"artifact": {"id": "a", "text": ""}}, fail()], 1),
        (RetryPolicy((), 2, 0), [{"custom": {"type": "t"}}, fail()], 2),
        (RetryPolicy((), 2, 0, after_output=True), [say("x"), fail()], 2),
        (None, [fail()], 1),
    ],
)
@pytest.mark.stores("memory")
async def test_r38_a_policy_repeats_what_it_names(
    store: Store, policy: RetryPolicy | None, steps: list[Any], expected: int
) -> None:
    async with running(store) as node:
        accepted = await node.accept("s", script(*steps), retry=policy)
        complete = await node.end(accepted.run.run_id)
        assert (complete.state, complete.attempt) == (S.FAILED, expected)


@pytest.mark.stores("memory")
async def test_r38_a_timeout_is_repeated_only_if_named(store: Store) -> None:
    async with running(store) as node:
        for reasons, expected in (((), 1), (("RUN_TIMEOUT",), 2)):
            policy = RetryPolicy(reasons, 2, 0)
            accepted = await node.accept(
                f"s{expected}", script(wait("w")), timeout=20_000, retry=policy
            )
            complete = await node.end(accepted.run.run_id)
            assert (complete.attempt, complete.finish_reason) == (expected, FinishReason.TIMEOUT)


def test_r38_the_backoff_doubles_up_to_its_maximum() -> None:
    policy = RetryPolicy((), 100, initial_backoff=10, max_backoff=50)
    assert [policy.pause(n) for n in (1, 2, 3, 4, 99)] == [10, 20, 40, 50, 50]
    assert RetryPolicy((), 2, initial_backoff=10, max_backoff=5).pause(1) == 10


async def test_r38_nothing_overtakes_a_run_that_waits(store: Store) -> None:
    async with running(store) as node:
        first = await back_off(node, "s")
        assert await node.coordinator.is_session_busy("s")
        later = await node.queue("s", "x")
        folds = await node.fold("s", "y")
        await node.queue("other", "x")
        assert await node.state(first) is S.ACCEPTED
        assert await node.state(later.run_id) is S.QUEUED
        assert await node.state(folds.run_id) is S.QUEUED
        receipt = await node.coordinator.cancel("s", run_id=first, scope=CancelScope.RUN)
        assert [(run.run_id, run.state) for run in receipt.cancelled] == [(first, S.ACCEPTED)]
        assert (await node.end(later.run_id)).text == "x"


@pytest.mark.parametrize("scope", [CancelScope.SESSION, CancelScope.ACTIVE, CancelScope.RUN])
async def test_r38_a_cancel_during_the_backoff_ends_the_run(
    store: Store, scope: CancelScope
) -> None:
    async with running(store) as node:
        run_id = await back_off(node, "s", LONG, say("half"))
        named = run_id if scope is CancelScope.RUN else ""
        await node.coordinator.cancel("s", run_id=named, scope=scope, reason="enough")
        complete = await node.end(run_id)
        assert (complete.state, complete.attempt, complete.text) == (S.CANCELLED, 1, "")
        lines = await node.lines("s")
        assert len(lines) == 2
        assert lines[1] == "assistant:  [canceled]"
        assert not await node.coordinator.is_session_busy("s")


async def test_r38_a_cancel_of_the_queue_spares_it_and_interrupt_does_not(store: Store) -> None:
    async with running(store) as node:
        run_id = await back_off(node, "s")
        waiting = await node.queue("s", "x")
        receipt = await node.coordinator.cancel("s", scope=CancelScope.WAITING)
        assert [run.run_id for run in receipt.cancelled] == [waiting.run_id]
        assert await node.state(run_id) is S.ACCEPTED
        urgent = await node.queue("s", "now", when_busy=WhenBusy.INTERRUPT)
        assert (await node.end(urgent.run_id)).text == "now"
        assert (await node.end(run_id)).cancel_reason == f"interrupted by {urgent.run_id}"


async def test_r38_a_backoff_survives_a_restart(store: Store) -> None:
    policy = RetryPolicy((), 2, initial_backoff=400_000, after_output=True)
    async with running(store) as node:
        run_id = await back_off(node, "s", policy)
    async with running(store) as node:
        complete = await node.end(run_id)
        assert (complete.state, complete.attempt) == (S.FAILED, 2)
        first, second = (
            event.at for event in await node.events(run_id) if isinstance(event.body, Started)
        )
        assert second - first >= 400_000


async def test_r38_attempts_lost_with_their_node_are_counted_apart(store: Store) -> None:
    policy = RetryPolicy((), 2, initial_backoff=0)
    async with running(store) as node:
        steps = [fail(attempts=1), wait("w")]
        accepted = await node.accept("s", script(*steps), retry=policy, max_attempts=2)
        await node.latches.reached("w")
        run_id = accepted.run.run_id
        assert (await node.coordinator.get_run(run_id)).attempt == 2
    async with running(store) as node:
        await node.latches.reached("w")
        assert (await node.coordinator.get_run(run_id)).attempt == 3
        node.latches.open("w")
        assert (await node.end(run_id)).state is S.COMPLETED


async def test_r38_folded_prompts_follow_the_repeated_run(store: Store) -> None:
    async with running(store) as node:
        steps = [wait("w"), {"step": True}, fail(attempts=1), say("!")]
        accepted = await node.accept("s", script(*steps), retry=QUICK)
        await node.latches.reached("w")
        folded = await node.fold("s", "more")
        node.latches.open("w")
        complete = await node.end(accepted.run.run_id)
        assert (complete.text, complete.attempt) == ("[folded: more]!", 2)
        assert (await node.end(folded.run_id)).folded_into == complete.run_id


async def test_r38_the_policy_is_part_of_the_request_that_idempotency_compares(
    store: Store,
) -> None:
    async with running(store) as node:
        first = await node.accept("s", script(say("x")), run_id="r", retry=QUICK)
        assert first.run.retry == QUICK
        await node.end("r")
        again = await node.accept("s", script(say("x")), run_id="r", retry=QUICK)
        assert again.run.run_id == "r"
        for other in (None, LONG):
            with pytest.raises(RunIdConflict):
                await node.accept("s", script(say("x")), run_id="r", retry=other)
        assert (await node.coordinator.get_run("r")).retry == QUICK
        page = await store.list_runs("default", limit=10)
        assert page.items[0].retry == QUICK
    plain = RunRequest("p", Prompt("x"))
    assert plain.fingerprint == plain.prompt.fingerprint


async def test_r38_the_stored_lane_knows_the_policy(store: Store) -> None:
    async with running(store) as node:
        await back_off(node, "s")
        lane = await store.load_lane(SessionKey("default", "s"))
        waits = lane.backing_off
        assert waits is not None
        assert (waits.retry, waits.failures) == (LONG, 1)
        events: list[RunEvent] = list(await node.events(waits.run_id))
        assert waits.not_before >= events[0].at + HOUR
        assert not lane.can_start_at(waits.not_before - 1)
        assert lane.can_start_at(waits.not_before)


async def test_r38_due_attempt_waits_for_its_agent_without_work(store: Store) -> None:
    """The node has free slots, but the agent of the run has none."""
    agent = ScriptedAgent()
    table = AgentTable([DeclaredAgent(DEFAULT_AGENT, agent, slots=1), DeclaredAgent("b", agent)])
    async with running(store, agent=table) as node:
        policy = replace(QUICK, initial_backoff=200_000, max_backoff=200_000)
        run_id = await back_off(node, "s", policy)
        await node.accept("t", script(wait("g")))
        await agent.latches.reached("g")
        async with asyncio.timeout(SECONDS):
            while not node.coordinator._lanes.slots.is_queued(SessionKey(DEFAULT_TENANT, "s")):
                await asyncio.sleep(0)
            await node.coordinator._lanes.wait_settled()
        granted = node.coordinator._lanes.slots._grants
        for _ in range(100):
            await asyncio.sleep(0)
        assert node.coordinator._lanes.slots._grants - granted <= 1
        agent.latches.open("g")
        assert (await node.end(run_id)).attempt == 3
