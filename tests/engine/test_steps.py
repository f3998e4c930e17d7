"""Steps (R39): a result that is stored is not computed again by a later attempt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from runlane_server.agents.base import AgentEvent, Turn
from runlane_server.agents.functions import FunctionAgent
from runlane_server.core.model import RunComplete, RunEvent, RunKey, RunState, StepResult, TextDelta
from runlane_server.core.retry import RetryPolicy
from runlane_server.store.base import Store
from support.node import Node, running
from support.staging import script, wait

pytestmark = pytest.mark.stores("memory", "sqlite", "postgresql")

AT_ONCE = RetryPolicy((), 3, initial_backoff=0, after_output=True)


@dataclass
class Stepping:
    """An agent that takes steps; `calls` are those whose work was done."""

    take: Callable[[Turn, Stepping], Any]
    calls: list[str] = field(default_factory=list)

    async def start(self) -> None:
        pass

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        yield TextDelta(str(await self.take(turn, self)))

    async def close(self) -> None:
        pass

    def work(self, name: str, result: object) -> Callable[[], object]:
        """Work that can be counted."""

        def call() -> object:
            self.calls.append(name)
            return result

        return call


def steps_of(events: Any) -> list[StepResult]:
    return [event.body for event in events if isinstance(event.body, StepResult)]


async def ended(node: Node, **options: Any) -> RunComplete:
    accepted = await node.accept("s", "x", **options)
    return await node.end(accepted.run.run_id)


async def test_r39_a_later_attempt_gets_the_stored_result(store: Store) -> None:
    async with running(store) as node:
        steps: list[Any] = [
            {"once": "a"},
            {"fail": "x", "attempts": 2},
            {"once": "b"},
            {"once": "a"},
        ]
        accepted = await node.accept("s", script(*steps), retry=AT_ONCE)
        complete = await node.end(accepted.run.run_id)
        assert (complete.text, complete.attempt) == ("131", 3)
        events = await node.events(complete.run_id)
        assert steps_of(events) == [StepResult("a", "1"), StepResult("b", "3")]


async def test_r39_a_step_of_a_lost_node_is_not_repeated(store: Store) -> None:
    async with running(store) as node:
        steps = [{"once": "a"}, wait("w")]
        accepted = await node.accept("s", script(*steps), max_attempts=2)
        await node.latches.reached("w")
    async with running(store) as node:
        await node.latches.reached("w")
        node.latches.open("w")
        complete = await node.end(accepted.run.run_id)
        assert (complete.text, complete.attempt) == ("1", 2)


async def test_r39_the_result_is_durable_before_the_agent_continues(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[StepResult] = []
    append = store.append

    async def noted(key: RunKey, attempt: int, events: list[RunEvent], *, host: str = "") -> None:
        await append(key, attempt, events, host=host)
        stored.extend(steps_of(events))

    monkeypatch.setattr(store, "append", noted)

    async def take(turn: Turn, agent: Stepping) -> object:
        await turn.step("a", agent.work("a", 1))
        return [step.key for step in stored]

    async with running(store, agent=Stepping(take)) as node:
        assert (await ended(node)).text == "['a']"


async def test_results_come_back_as_json_reads_them_and_work_may_be_async(store: Store) -> None:
    async def later() -> object:
        await asyncio.sleep(0)
        return {"ö": None}

    async def take(turn: Turn, agent: Stepping) -> object:
        first = await turn.step("a", agent.work("a", (1, 2.5)))
        again = await turn.step("a", agent.work("again", 0))
        return [first, again, await turn.step("b", later)]

    agent = Stepping(take)
    async with running(store, agent=agent) as node:
        assert (await ended(node)).text == str([[1, 2.5], [1, 2.5], {"ö": None}])
    assert agent.calls == ["a"]


@pytest.mark.stores("memory")
async def test_work_that_raises_is_done_again(store: Store) -> None:
    def fail() -> object:
        raise LookupError("not today")

    async def take(turn: Turn, agent: Stepping) -> object:
        if turn.attempt == 1:
            await turn.step("a", fail)
        return await turn.step("a", agent.work("a", "done"))

    async with running(store, agent=Stepping(take)) as node:
        complete = await ended(node, retry=AT_ONCE)
        assert (complete.text, complete.attempt) == ("done", 2)


@pytest.mark.stores("memory")
@pytest.mark.parametrize(
    ("key", "result", "message"),
    [
        ("", 1, "key of a step is empty"),
        ("k" * 129, 1, "key of a step has 129 bytes"),
        (7, 1, "key of a step must be a str"),
        ("k", object(), "result of a step is no JSON value"),
        ("k", "x" * (1 << 20), "result of a step has"),
    ],
)
async def test_a_step_that_cannot_be_stored_fails_the_run(
    store: Store, key: Any, result: object, message: str
) -> None:
    async def take(turn: Turn, agent: Stepping) -> object:
        return await turn.step(key, agent.work("a", result))

    async with running(store, agent=Stepping(take)) as node:
        complete = await ended(node)
        assert complete.state is RunState.FAILED
        assert complete.error is not None
        assert message in complete.error.message


@pytest.mark.stores("memory")
async def test_a_step_within_itself_is_refused(store: Store) -> None:
    async def take(turn: Turn, agent: Stepping) -> object:
        return await turn.step("a", lambda: turn.step("a", agent.work("a", 1)))

    async with running(store, agent=Stepping(take)) as node:
        complete = await ended(node)
        assert complete.error is not None
        assert "step 'a' is at work already" in complete.error.message


async def test_r39_a_thread_takes_steps_too(store: Store) -> None:
    calls: list[int] = []

    def answer(turn: Any) -> str:
        def work() -> int:
            calls.append(turn.attempt)
            return len(calls)

        found = turn.step("a", work)
        if turn.attempt == 1:
            raise RuntimeError("again")
        return f"{found} of {turn.attempt}"

    async with running(store, agent=FunctionAgent(answer)) as node:
        accepted = await node.accept("s", "x", retry=AT_ONCE)
        assert (await node.end(accepted.run.run_id)).text == "1 of 2"
    assert calls == [1]


@pytest.mark.stores("memory")
async def test_a_step_of_a_cancelled_run_is_not_stored(store: Store) -> None:
    at_work = asyncio.Event()

    async def forever() -> object:
        at_work.set()
        await asyncio.Event().wait()
        return 1

    async def take(turn: Turn, agent: Stepping) -> object:
        return await turn.step("a", forever)

    async with running(store, agent=Stepping(take)) as node:
        accepted = await node.accept("s", "x")
        await at_work.wait()
        await node.coordinator.cancel("s")
        complete = await node.end(accepted.run.run_id)
        assert complete.state is RunState.CANCELLED
        assert steps_of(await node.events(complete.run_id)) == []


async def test_r39_the_journal_of_many_events_is_read_by_pages(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runlane_server.engine.step_journal.PAGE_EVENTS", 2)
    steps: list[Any] = [{"once": str(n)} for n in range(5)]
    async with running(store) as node:
        accepted = await node.accept(
            "s", script(*steps, {"fail": "x", "attempts": 1}, *steps), retry=AT_ONCE
        )
        assert (await node.end(accepted.run.run_id)).text == "1" * 10
