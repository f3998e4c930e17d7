"""Agents made of functions of every kind, on the event loop and in threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from functools import partial
from typing import Any

import pytest

from runlane_server.agents.base import AgentError, Turn
from runlane_server.agents.custom import as_agent
from runlane_server.agents.functions import BlockingTurn, FunctionAgent
from runlane_server.core.model import Role, TextDelta
from support.turns import LocalTurn, ask, collect, message


async def yields_async(turn: Turn) -> AsyncGenerator[str, None]:
    yield turn.prompt.text
    yield "!"


async def returns_async(turn: Turn) -> str:
    await turn.emit(turn.prompt.text)
    return "!"


def yields(turn: BlockingTurn) -> Generator[str, None, None]:
    yield turn.prompt.text
    yield "!"


def returns(turn: BlockingTurn) -> str:
    turn.emit(turn.prompt.text)
    return "!"


class Methods:
    def answer(self, turn: BlockingTurn) -> str:
        return f"{turn.prompt.text}!"


def with_word(word: str, turn: BlockingTurn) -> str:
    return turn.prompt.text + word


def returns_generator(turn: Turn) -> AsyncGenerator[str, None]:
    return yields_async(turn)


async def all_text(function: Callable[[Any], Any], turn: LocalTurn) -> str:
    events = await collect(as_agent("it", function), turn)
    return "".join(e.text for e in (*turn.emitted, *events) if isinstance(e, TextDelta))


@pytest.mark.parametrize(
    "function",
    [
        *(yields_async, returns_async, yields, returns, Methods().answer, returns_generator),
        *(partial(with_word, "!"), lambda turn: f"{turn.prompt.text}!"),
    ],
)
async def test_a_function_is_an_agent_whatever_its_kind(function: Callable[[Any], Any]) -> None:
    assert await all_text(function, ask("hi")) == "hi!"


@pytest.mark.parametrize("kind", [None, "async"])
async def test_a_function_may_return_nothing(kind: str | None) -> None:
    async def quiet(turn: Turn) -> None: ...

    assert await all_text(quiet if kind else lambda turn: None, ask("hi")) == ""


async def test_a_function_in_a_thread_reads_the_history_and_the_folded_prompts() -> None:
    def answer(turn: BlockingTurn) -> Generator[str, None, None]:
        yield f"{len(turn.history())} "
        yield from (folded.prompt.text for folded in turn.take_folded())

    turn = ask("x", waiting=["a", "b"])
    turn.messages.append(message(1, Role.USER, "before"))
    assert await all_text(answer, turn) == "1 ab"


async def test_plain_functions_run_beside_each_other_and_beside_the_event_loop() -> None:
    barrier = threading.Barrier(3)

    def answer(turn: BlockingTurn) -> str:
        barrier.wait(10)
        return turn.prompt.text

    agent = FunctionAgent(answer)
    tasks = [asyncio.create_task(collect(agent, ask(text))) for text in "ab"]
    await asyncio.to_thread(barrier.wait, 10)
    assert await asyncio.gather(*tasks) == [[TextDelta("a")], [TextDelta("b")]]


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), StopIteration("x")])
async def test_an_exception_in_a_thread_reaches_the_server(error: BaseException) -> None:
    def fail(turn: BlockingTurn) -> None:
        raise error

    caught: list[BaseException] = []
    try:
        await _first(FunctionAgent(fail).run(ask("x")))
    except BaseException as exc:  # noqa: BLE001 - SystemExit is one of them
        caught.append(exc)
    assert caught[0] is error or caught[0].__cause__ is error


async def _first(events: AsyncGenerator[object, None]) -> object:
    return await anext(events, None)


@pytest.mark.parametrize("result", [42, ["text"], b"text"])
async def test_a_result_that_is_no_event_fails_the_run(result: object) -> None:
    with pytest.raises(AgentError, match=f"returned a {type(result).__name__}") as failed:
        await collect(FunctionAgent(lambda turn: result), ask("x"))
    assert failed.value.reason == "BAD_EVENT"


async def test_a_yielded_value_that_is_no_event_fails_the_run_and_closes_the_generator() -> None:
    closed: list[bool] = []

    def answer(turn: BlockingTurn) -> Generator[object, None, None]:
        try:
            yield 42
        finally:
            closed.append(True)

    with pytest.raises(AgentError, match="yielded a int"):
        await collect(FunctionAgent(answer), ask("x"))
    assert closed == [True]


class Blocked:
    """A function that blocks its thread until it is released."""

    def __init__(self, go_on: Callable[[BlockingTurn], object]) -> None:
        self.reached = asyncio.Event()
        self.release = threading.Event()
        self.ended: list[str] = []
        self._go_on = go_on
        self._loop = asyncio.get_running_loop()

    def __call__(self, turn: BlockingTurn) -> object:
        self._loop.call_soon_threadsafe(self.reached.set)
        self.release.wait(10)
        try:
            result = self._go_on(turn)
        except BaseException as exc:
            self.ended.append(type(exc).__name__)
            raise
        self.ended.append("returned")
        return result


CALLS: list[tuple[Callable[[BlockingTurn], object], str]] = [
    (lambda turn: turn.emit("late"), "CancelledError"),
    (lambda turn: turn.history(), "CancelledError"),
    (lambda turn: turn.take_folded(), "CancelledError"),
    (lambda turn: f"{turn.is_cancelled}", "returned"),
]


@pytest.mark.parametrize(("go_on", "ending"), CALLS)
async def test_r09_a_cancel_waits_for_the_thread_and_ends_it_at_its_next_call(
    go_on: Callable[[BlockingTurn], object], ending: str
) -> None:
    blocked = Blocked(go_on)
    turn = ask("x")
    task = asyncio.create_task(collect(FunctionAgent(blocked.__call__), turn))
    await blocked.reached.wait()
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=0.05)
    assert not done
    blocked.release.set()
    await asyncio.wait({task})
    assert task.cancelled()
    assert blocked.ended == [ending]
    assert turn.emitted == []


async def test_a_generator_in_a_thread_is_closed_where_it_yields_after_a_cancel() -> None:
    steps: list[str] = []
    reached, release = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def answer(turn: BlockingTurn) -> Generator[str, None, None]:
        try:
            yield "a"
            loop.call_soon_threadsafe(reached.set)
            release.wait(10)
            yield "b"
            steps.append("went on")
        finally:
            steps.append("closed")

    turn = ask("x")
    task = asyncio.create_task(collect(FunctionAgent(answer), turn))
    await reached.wait()
    task.cancel()
    await asyncio.sleep(0)
    release.set()
    await asyncio.wait({task})
    assert (task.cancelled(), steps, turn.emitted) == (True, ["closed"], [TextDelta("a")])


async def test_a_plain_function_that_returns_a_coroutine_is_told_what_to_declare() -> None:
    async def inner(turn: Any) -> str:
        turn.emit("x")
        return "never"

    def answer(turn: BlockingTurn) -> Awaitable[str]:
        return inner(turn)

    with pytest.raises(AgentError, match="must be declared with async def"):
        await collect(FunctionAgent(answer), ask("x"))
