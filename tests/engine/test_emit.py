"""Output that an agent emits beside what it yields, from the event loop and from threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from runlane_server.agents.base import Report, Turn
from runlane_server.agents.functions import BlockingTurn, FunctionAgent
from runlane_server.core.model import FinishReason, Prompt, RunComplete, RunState
from runlane_server.store.base import Store
from support.node import running

pytestmark = pytest.mark.stores("memory", "sqlite")


async def outcome(store: Store, function: Callable[[Any], object]) -> RunComplete:
    async with running(store, agent=FunctionAgent(function)) as node:
        return await node.coordinator.run("s", Prompt("x"))


async def test_emitted_and_yielded_events_are_stored_in_order(store: Store) -> None:
    async def answer(turn: Turn) -> AsyncGenerator[str, None]:
        await turn.emit("a")
        yield "b"
        await turn.emit("c")
        await turn.emit(Report(finish_reason=FinishReason.LENGTH))

    complete = await outcome(store, answer)
    assert (complete.state, complete.text) == (RunState.COMPLETED, "abc")
    assert complete.finish_reason is FinishReason.LENGTH


async def test_an_invalid_emitted_event_fails_the_run_in_a_thread_and_on_the_loop(
    store: Store,
) -> None:
    async def on_the_loop(turn: Any) -> None:
        await turn.emit("so far")
        await turn.emit(Report(model=42))  # type: ignore[arg-type]

    def in_a_thread(turn: Any) -> None:
        turn.emit("so far")
        turn.emit(Report(model=42))  # type: ignore[arg-type]

    for function in (on_the_loop, in_a_thread):
        complete = await outcome(store, function)
        assert (complete.state, complete.text) == (RunState.FAILED, "so far")
        assert complete.error is not None
        assert "Report.model" in complete.error.message


async def test_sys_exit_in_a_thread_fails_its_run_only(store: Store) -> None:
    def leave(turn: BlockingTurn) -> None:
        raise SystemExit(3)

    complete = await outcome(store, leave)
    assert complete.error is not None
    assert complete.error.message == "the agent raised SystemExit: 3"


async def test_an_event_after_the_end_of_the_turn_is_dropped(store: Store) -> None:
    turns: list[Turn] = []

    async def answer(turn: Turn) -> str:
        turns.append(turn)
        return "all"

    async with running(store, agent=FunctionAgent(answer)) as node:
        first = await node.coordinator.run("s", Prompt("x"))
        await turns[0].emit("late")
        second = await node.coordinator.run("s", Prompt("y"))
        messages = await node.messages("s")
    assert (first.text, second.text) == ("all", "all")
    assert "late" not in str(messages)


async def test_r09_a_session_stays_busy_until_the_thread_of_a_cancelled_run_returns(
    store: Store,
) -> None:
    reached, release = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def answer(turn: BlockingTurn) -> None:
        if turn.prompt.text == "block":
            turn.emit("so far")
            loop.call_soon_threadsafe(reached.set)
            release.wait(10)
            turn.emit("too late")

    async with running(store, agent=FunctionAgent(answer)) as node:
        first = (await node.accept("s", "block")).run
        await reached.wait()
        receipt = await node.coordinator.cancel("s")
        second = (await node.accept("s", "next")).run
        assert [run.run_id for run in receipt.cancelled] == [first.run_id]
        assert await node.state(first.run_id) is RunState.CANCELLING
        release.set()
        ends = [await node.end(run.run_id) for run in (first, second)]
    assert [end.state for end in ends] == [RunState.CANCELLED, RunState.COMPLETED]
    assert ends[0].text == "so far"
    assert ends[0].ended_at <= (ends[1].started_at or 0)
