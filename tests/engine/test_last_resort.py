"""Every run that started gets its end (R21), also if something fails between the two."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from runlane_server.agents.base import AgentEvent, Turn
from runlane_server.core.errors import RunlaneError
from runlane_server.core.model import (
    Prompt,
    RunEvent,
    RunKey,
    RunState,
    TextDelta,
    ToolCall,
)
from runlane_server.core.observer import Observer
from runlane_server.core.transition import Outcome
from runlane_server.engine.lane_access import LaneAccess
from runlane_server.engine.runner import Runner
from runlane_server.store.base import Store
from support.node import Node, running

Wrong = Any
"""A value of a type that the annotation of its field does not allow."""

CALLBACKS = (
    "on_accepted",
    "on_lane_changed",
    "on_attempt_started",
    "on_agent_returned",
    "on_attempt_ended",
    "on_cancelled",
    "agent_traceparent",
)


@dataclass
class Agent:
    """Yields a text, calls a function, and yields another text."""

    between: Callable[[], object] = field(default=lambda: None)
    steps: list[AgentEvent] = field(default_factory=lambda: [TextDelta("a"), TextDelta("b")])

    async def start(self) -> None:
        pass

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        for step in self.steps:
            yield step
            await asyncio.sleep(0.01)
            self.between()

    async def close(self) -> None:
        pass


async def run(node: Node, text: str = "x") -> tuple[RunState, str]:
    """Runs a prompt; returns the state, and the reason of its error."""
    async with asyncio.timeout(20):
        complete = await node.coordinator.run("s", Prompt(text))
    return complete.state, "" if complete.error is None else complete.error.reason


def assert_no_gap(events: Sequence[RunEvent]) -> None:
    assert [event.index for event in events] == list(range(1, len(events) + 1))


class Fragile(Observer):
    """An observer that raises in one of its callbacks."""

    def __init__(self, callback: str) -> None:
        self.calls = 0
        setattr(self, callback, self._fail)

    def _fail(self, *_: object) -> str:
        self.calls += 1
        raise ZeroDivisionError("a bug of the observer")


@pytest.mark.stores("memory", "sqlite")
@pytest.mark.parametrize("callback", CALLBACKS)
async def test_r21_an_observer_that_raises_harms_no_run(store: Store, callback: str) -> None:
    observer = Fragile(callback)
    async with running(store, agent=Agent(), observer=observer) as node:
        assert await run(node) == (RunState.COMPLETED, "")
        waiting = await node.accept("t", "y")
        await node.coordinator.cancel("t")
        await node.end(waiting.run.run_id)
        assert await run(node) == (RunState.COMPLETED, "")
    assert observer.calls > 0


async def test_r21_a_run_whose_supervisor_cannot_be_made_ends_failed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Runner, *_: object, **__: object) -> None:
        raise MemoryError("no room for a runner")

    async with running(store, agent=Agent()) as node:
        with monkeypatch.context() as patch:
            patch.setattr(Runner, "__init__", broken)
            assert await run(node) == (RunState.FAILED, "AGENT_ERROR")
        assert await run(node) == (RunState.COMPLETED, "")
        assert node.coordinator.load.slots_in_use == 0


@pytest.mark.stores("memory", "sqlite")
async def test_r21_a_supervisor_that_an_agent_cancels_ends_its_run(store: Store) -> None:
    def cancel_supervisor() -> None:
        for task in asyncio.all_tasks():
            if "_supervise" in repr(task.get_coro()):
                task.cancel()

    agent = Agent(between=cancel_supervisor)
    async with running(store, agent=agent) as node:
        assert await run(node) == (RunState.FAILED, "AGENT_ERROR")
        agent.between = lambda: None
        assert await run(node) == (RunState.COMPLETED, "")


async def test_r21_output_that_cannot_be_stored_ends_the_run_without_a_gap(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = store.append

    async def refuse_tools(
        key: RunKey, attempt: int, events: Sequence[RunEvent], *, host: str = ""
    ) -> None:
        if any(isinstance(event.body, ToolCall) for event in events):
            raise OverflowError("a value that no store takes")
        await append(key, attempt, events, host=host)

    agent = Agent(steps=[TextDelta("a"), ToolCall("c", "look", "{}"), TextDelta("b")])
    async with running(store, agent=agent) as node:
        with monkeypatch.context() as patch:
            patch.setattr(store, "append", refuse_tools)
            accepted = await node.accept("s", "x")
            async with asyncio.timeout(20):
                complete = await node.end(accepted.run.run_id)
        assert complete.state is RunState.FAILED
        events = await node.events(accepted.run.run_id)
        assert_no_gap(events)
        assert any(event.body == TextDelta("a") for event in events)
        assert await run(node) == (RunState.COMPLETED, "")


async def test_r21_a_last_resort_end_that_fails_is_repeated_without_a_gap(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, failures = LaneAccess.finish, 0

    async def fail_twice(self: LaneAccess, *given: Wrong) -> None:
        nonlocal failures
        if failures < 2:
            failures += 1
            raise OverflowError("a value that no store takes")
        assert next(one for one in given if isinstance(one, Outcome)).content == ()
        await finish(self, *given)

    monkeypatch.setattr(LaneAccess, "finish", fail_twice)
    monkeypatch.setattr("runlane_server.engine.lane_access.RETRY_PAUSE", 0.01)
    async with running(store, agent=Agent()) as node:
        accepted = await node.accept("s", "x")
        async with asyncio.timeout(20):
            complete = await node.end(accepted.run.run_id)
        assert complete.state is RunState.FAILED
        assert failures == 2
        assert_no_gap(await node.events(accepted.run.run_id))


@pytest.mark.stores("sqlite", "postgresql")
async def test_r24_a_command_that_cannot_be_written_fails_alone(store: Store) -> None:
    wrong: Wrong = {"label": object()}
    async with running(store, agent=Agent()) as node:
        # A first one, so that the others wait in the mailbox while it is committed.
        prompts = [("first", {}), ("before", {}), ("wrong", wrong), ("after", {})]
        results = await asyncio.gather(
            *(node.accept("s", text, metadata=metadata) for text, metadata in prompts),
            return_exceptions=True,
        )
        failed = [n for n, result in enumerate(results) if isinstance(result, BaseException)]
        assert failed == [2]
        assert isinstance(results[2], TypeError)
        assert not isinstance(results[2], RunlaneError)
        accepted = [result.run for result in results if not isinstance(result, BaseException)]
        assert [it.accept_seq for it in accepted] == sorted(it.accept_seq for it in accepted)
        for it in accepted:
            assert (await node.end(it.run_id)).state is RunState.COMPLETED
        assert not await node.coordinator.is_session_busy("s")


class Unwritable:
    """A value for which the drivers raise errors that no store expects."""

    def __repr__(self) -> str:
        raise AssertionError("it cannot even be shown")


@pytest.mark.stores("sqlite", "postgresql")
async def test_r24_a_row_that_cannot_be_encoded_is_refused_as_itself(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that says "the store is unavailable" would be repeated forever."""
    append = store.append

    async def spoil(
        key: RunKey, attempt: int, events: Sequence[RunEvent], *, host: str = ""
    ) -> None:
        if any(event.body == TextDelta("bad") for event in events):
            wrong: Wrong = Unwritable()
            events = [replace(event, at=wrong) for event in events]
        await append(key, attempt, events, host=host)

    monkeypatch.setattr(store, "append", spoil)
    agent = Agent(steps=[TextDelta("bad"), TextDelta("more")])
    async with running(store, agent=agent) as node:
        assert await run(node) == (RunState.FAILED, "AGENT_ERROR")
        agent.steps = [TextDelta("fine")]
        assert await run(node) == (RunState.COMPLETED, "")
