"""Unusual and invalid events of agents, and how they are stored."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

import pytest

from runlane_server.agents.base import AgentError, AgentEvent, Report, Turn
from runlane_server.core.model import (
    FinishReason,
    Prompt,
    ReasoningDelta,
    RunComplete,
    RunEvent,
    RunKey,
    RunState,
    TextDelta,
    ToolCall,
    ToolResult,
    Usage,
)
from runlane_server.engine.outbox import Outbox
from runlane_server.engine.runner import Runner
from runlane_server.store.base import Store
from support.node import running
from support.staging import SECONDS

pytestmark = pytest.mark.stores("memory", "sqlite")

S = RunState


@dataclass
class Yielding:
    """An agent that yields the given events and then calls a function."""

    events: Sequence[AgentEvent]
    then: Callable[[], None] = field(default=lambda: None)

    async def start(self) -> None:
        pass

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        for event in self.events:
            yield event
        self.then()

    async def close(self) -> None:
        pass


async def outcome(store: Store, agent: Yielding) -> RunComplete:
    async with running(store, agent=agent) as node:
        return await node.coordinator.run("s", Prompt("x"))


async def test_a_lone_surrogate_is_replaced_and_two_halves_are_joined(store: Store) -> None:
    said: list[AgentEvent] = [
        TextDelta("a\ud800b"),
        ReasoningDelta("\udc00"),
        TextDelta("\ud83d\ude00"),
    ]
    complete = await outcome(store, Yielding(said))
    assert complete.text == "a\ufffdb\U0001f600"


@pytest.mark.parametrize(
    "events",
    [
        [ToolResult("1", "look", "nobody asked")],
        [ToolCall("1", "look", "{}"), ToolCall("1", "look", "{}")],
        [ToolCall("1", "look", '{"x": "' + "y" * (1 << 20) + '"}')],
        [ToolCall("1" * 70_000, "look", "{}")],
    ],
)
async def test_invalid_tool_events_fail_the_run(store: Store, events: Sequence[AgentEvent]) -> None:
    complete = await outcome(store, Yielding([TextDelta("so far"), *events]))
    assert (complete.state, complete.finish_reason) == (S.FAILED, FinishReason.ERROR)
    assert complete.error is not None
    assert complete.error.reason == "AGENT_ERROR"
    assert complete.text == "so far"


async def test_a_long_tool_result_is_cut(store: Store) -> None:
    events: list[AgentEvent] = [
        ToolCall("1", "look", "{}"),
        ToolResult("1", "look", "é" * (1 << 20)),
    ]
    async with running(store, agent=Yielding(events)) as node:
        await node.coordinator.run("s", Prompt("x"))
        result = (await node.messages("s"))[-2].parts[0]
        assert isinstance(result, ToolResult)
        assert result.content == "é" * (1 << 19)


async def test_usage_adds_up_and_the_last_model_and_finish_reason_win(store: Store) -> None:
    complete = await outcome(
        store,
        Yielding(
            [
                Report(Usage(input_tokens=1), model="a", finish_reason=FinishReason.STOP),
                Report(Usage(output_tokens=2), finish_reason=FinishReason.LENGTH),
                Report(),
            ]
        ),
    )
    assert complete.usage == Usage(input_tokens=1, output_tokens=2)
    assert complete.finish_reason is FinishReason.LENGTH


def explain() -> None:
    raise AgentError("x" * 10_000, reason="WORD")


def stumble() -> None:
    raise LookupError("lost \ud800")


def cancel_itself() -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("then", "reason", "message"),
    [
        (explain, "WORD", "x" * 2048),
        (stumble, "AGENT_ERROR", "LookupError: lost \ufffd"),
        (cancel_itself, "AGENT_ERROR", "the agent cancelled its own task"),
    ],
)
async def test_a_failing_agent_provides_the_error_of_its_run(
    store: Store, then: Callable[[], None], reason: str, message: str
) -> None:
    complete = await outcome(store, Yielding([TextDelta("so far")], then))
    assert complete.error is not None
    assert (complete.error.reason, complete.error.message) == (reason, message)
    assert (complete.state, complete.text) == (S.FAILED, "so far")


async def test_an_agent_without_output_writes_an_empty_answer(store: Store) -> None:
    async with running(store, agent=Yielding([])) as node:
        complete = await node.coordinator.run("s", Prompt("x"))
        assert complete.state is S.COMPLETED
        assert await node.lines("s") == ["user: x", "assistant:  [stop]"]


async def test_output_of_an_agent_that_returns_at_once_is_stored_with_the_end(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    appended: list[RunKey] = []
    append = store.append

    async def noted(key: RunKey, attempt: int, events: Sequence[RunEvent]) -> None:
        appended.append(key)
        await append(key, attempt, events)

    monkeypatch.setattr(store, "append", noted)
    complete = await outcome(store, Yielding([TextDelta("a"), TextDelta("b")]))
    assert (complete.text, appended) == ("ab", [])


def attempts_kept() -> list[object]:
    """The runners and outboxes in memory. An earlier test may have left some with its traceback."""
    return [it for it in gc.get_objects() if isinstance(it, Runner | Outbox)]


def new_among(kept: list[object], before: list[object]) -> list[object]:
    """Those that were not there before."""
    return [it for it in kept if not any(it is other for other in before)]


async def test_a_failed_run_is_freed_by_the_garbage_collector(store: Store) -> None:
    def fail() -> None:
        raise ValueError

    before = attempts_kept()
    async with running(store, agent=Yielding([TextDelta("a")], fail)) as node:
        for _ in range(3):
            await node.coordinator.run("s", Prompt("x"))
        await node.coordinator.wait_idle(SECONDS)
        await asyncio.sleep(0)
        gc.collect()
        assert new_among(attempts_kept(), before) == []


async def test_an_ended_run_is_freed_without_the_garbage_collector(store: Store) -> None:
    async with running(store, agent=Yielding([TextDelta("a")])) as node:
        await node.coordinator.run("s", Prompt("x"))
        gc.collect()
        gc.disable()
        before = attempts_kept()
        try:
            await node.coordinator.run("s", Prompt("x"))
            await node.coordinator.wait_idle(SECONDS)
            await asyncio.sleep(0)
            left = new_among(attempts_kept(), before)
        finally:
            gc.enable()
        assert left == []
