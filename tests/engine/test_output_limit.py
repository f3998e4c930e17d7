"""The limit of what an agent emits, and the pauses of an agent that emits without end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass

import pytest

from runlane_server.agents.base import AgentEvent, Turn
from runlane_server.core.limits import Limits
from runlane_server.core.model import (
    Prompt,
    Reasoning,
    ReasoningDelta,
    RunComplete,
    RunState,
    Text,
    TextDelta,
    ToolCall,
    ToolResult,
)
from runlane_server.core.transition import Transition
from runlane_server.engine.outbox import OUTBOX_CHARS, PART_BYTES
from runlane_server.store.base import Store
from runlane_server.store.memory.store import MemoryStore
from support.node import Node, running
from support.staging import SECONDS

pytestmark = pytest.mark.stores("memory", "sqlite", "postgresql")

LIMIT = 100_000


@dataclass
class Endless:
    """An agent that never awaits: it yields all that a generator has."""

    emit: Callable[[], Iterator[AgentEvent]]
    yielded: int = 0

    async def start(self) -> None:
        pass

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        for event in self.emit():
            self.yielded += 1
            yield event

    async def close(self) -> None:
        pass


def words() -> Iterator[AgentEvent]:
    while True:
        yield TextDelta("word ")


def wide_characters() -> Iterator[AgentEvent]:
    while True:
        yield TextDelta("\U0001f600" * 100)


def one_huge_text() -> Iterator[AgentEvent]:
    yield TextDelta("x" * (LIMIT * 10))


def alternating_kinds() -> Iterator[AgentEvent]:
    while True:
        yield TextDelta("t")
        yield ReasoningDelta("r")


def tools() -> Iterator[AgentEvent]:
    n = 0
    while True:
        n += 1
        yield ToolCall(str(n), "look", '{"x": "' + "y" * 1000 + '"}')
        yield ToolResult(str(n), "look", "z" * 1000)


def long_call_ids() -> Iterator[AgentEvent]:
    n = 0
    while True:
        n += 1
        yield ToolCall(f"{n:060000}", "look", "{}")


async def ended(store: Store, agent: Endless, limit: int = LIMIT) -> tuple[RunComplete, int]:
    """The end of a run of the agent, and the bytes of its transcript with the cost of parts."""
    limits = Limits(cancel_grace=SECONDS, max_run_output=limit)
    async with running(store, agent=agent, limits=limits) as node:
        complete = await node.coordinator.run("s", Prompt("x"))
        # What follows the calls that the end cut off is the server's and not the agent's.
        return complete, await _emitted(node)


async def _emitted(node: Node) -> int:
    size = 0
    for message in (await node.messages("s"))[1:]:
        for part in message.parts:
            match part:
                case ToolCall(call_id, name, content) | ToolResult(call_id, name, content, False):
                    size += PART_BYTES + len(call_id + name + content)
                case Text(text):
                    size += len(text.encode())
                case _:
                    pass
    return size


@pytest.mark.parametrize(
    "emit", [words, wide_characters, one_huge_text, alternating_kinds, tools, long_call_ids]
)
async def test_r21_endless_output_ends_the_run_and_keeps_what_is_within_the_limit(
    store: Store, emit: Callable[[], Iterator[AgentEvent]]
) -> None:
    complete, size = await ended(store, Endless(emit))
    assert complete.state is RunState.FAILED
    assert complete.error is not None
    assert complete.error.reason == "OUTPUT_LIMIT"
    assert "100000 bytes (--max-run-output)" in complete.error.message
    assert size <= LIMIT
    if emit in {words, wide_characters, one_huge_text}:
        assert size >= LIMIT - PART_BYTES - 3
        assert complete.text


async def test_output_of_exactly_the_limit_completes(store: Store) -> None:
    agent = Endless(lambda: iter([TextDelta("é" * 100)]))
    complete, _ = await ended(store, agent, PART_BYTES + 200)
    assert (complete.state, complete.text) == (RunState.COMPLETED, "é" * 100)


async def test_output_of_one_byte_more_than_the_limit_fails(store: Store) -> None:
    agent = Endless(lambda: iter([TextDelta("é" * 100)]))
    complete, _ = await ended(store, agent, PART_BYTES + 199)
    assert (complete.state, complete.text) == (RunState.FAILED, "é" * 99)


async def test_the_session_goes_on_after_a_run_that_reached_the_limit(store: Store) -> None:
    limits = Limits(cancel_grace=SECONDS, max_run_output=LIMIT)
    async with running(store, agent=Endless(words), limits=limits) as node:
        runs = [(await node.accept("s", "x")).run for _ in range(2)]
        ends = [await node.end(run.run_id) for run in runs]
    assert [end.error and end.error.reason for end in ends] == ["OUTPUT_LIMIT"] * 2


async def test_an_agent_that_never_awaits_is_cancelled_in_the_middle_of_its_output(
    store: Store,
) -> None:
    agent = Endless(words)
    limits = Limits(cancel_grace=SECONDS, max_run_output=1 << 30)
    async with running(store, agent=agent, limits=limits) as node:
        run = (await node.accept("s", "x")).run
        while await node.state(run.run_id) is not RunState.ACTIVE:
            await asyncio.sleep(0)
        await node.coordinator.cancel("s")
        assert (await node.end(run.run_id)).state is RunState.CANCELLED


async def test_empty_deltas_leave_the_event_loop_to_others(store: Store) -> None:
    turns = 0

    def empty_deltas() -> Iterator[AgentEvent]:
        first = turns
        while turns < first + 10:
            yield TextDelta("")
        yield TextDelta("others had their turns")

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    others = asyncio.create_task(count())
    async with running(store, agent=Endless(empty_deltas)) as node:
        assert (await node.coordinator.run("s", Prompt("x"))).state is RunState.COMPLETED
    others.cancel()


class SlowToClose(Endless):
    """An agent that never returns by itself once it is closed."""

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        try:
            for event in self.emit():
                yield event
        finally:
            await asyncio.Event().wait()


@pytest.mark.parametrize("emit", [words, lambda: iter([ToolResult("1", "look", "unasked")])])
async def test_r21_a_refused_agent_that_does_not_return_ends_after_the_grace(
    store: Store, emit: Callable[[], Iterator[AgentEvent]]
) -> None:
    limits = Limits(cancel_grace=0.1, max_run_output=LIMIT)
    async with running(store, agent=SlowToClose(emit), limits=limits) as node:
        run = (await node.accept("s", "x")).run
        complete = await node.end(run.run_id)
        assert complete.error is not None
        expected = "OUTPUT_LIMIT" if emit is words else "AGENT_ERROR"
        assert (complete.state, complete.error.reason) == (RunState.FAILED, expected)


class Watching(MemoryStore):
    """A store that knows the largest batch of characters that it was given at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    async def append(self, key, attempt, events, **options) -> None:  # type: ignore[no-untyped-def]
        chars = sum(len(event.body.text) for event in events)
        self.largest = max(self.largest, chars)
        await super().append(key, attempt, events, **options)


@pytest.mark.stores("memory")
async def test_one_huge_text_is_stored_in_small_batches() -> None:
    limits = Limits(cancel_grace=SECONDS, max_run_output=1 << 23)
    async with (
        Watching() as store,
        running(
            store, agent=Endless(lambda: iter([TextDelta("x" * (1 << 22))])), limits=limits
        ) as node,
    ):
        complete = await node.coordinator.run("s", Prompt("x"))
        assert complete.state is RunState.COMPLETED
    assert OUTBOX_CHARS <= store.largest <= 2 * OUTBOX_CHARS


class Weighing(MemoryStore):
    """A store that knows the most characters that a commit wrote to the transcript."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    async def commit(self, base_version: int, transition: Transition) -> int:
        chars = sum(
            len(part.text)
            for message in transition.messages
            for part in message.parts
            if isinstance(part, Text | Reasoning)
        )
        self.largest = max(self.largest, chars)
        return await super().commit(base_version, transition)


LONG = 5 << 20


def long_answer() -> Iterator[AgentEvent]:
    """Reasoning and text of 5 MiB each, with numbers, so that no two parts are the same."""
    for kind in (ReasoningDelta, TextDelta):
        for n in range(LONG // 1024):
            yield kind(f"{n:05}".ljust(1024, "."))


@pytest.mark.stores("memory")
async def test_end_of_a_long_run_has_little_to_write() -> None:
    limits = Limits(cancel_grace=SECONDS, max_run_output=1 << 24)
    async with (
        Weighing() as store,
        running(store, agent=Endless(long_answer), limits=limits) as node,
    ):
        complete = await node.coordinator.run("s", Prompt("x"))
        assert complete.state is RunState.COMPLETED
        assert store.largest < 4 << 20


async def test_long_run_is_whole_in_the_transcript(store: Store) -> None:
    limits = Limits(cancel_grace=SECONDS, max_run_output=1 << 24)
    async with running(store, agent=Endless(long_answer), limits=limits) as node:
        complete = await node.coordinator.run("s", Prompt("x"))
        message = (await node.messages("s"))[-1]
    expected = "".join(f"{n:05}".ljust(1024, ".") for n in range(LONG // 1024))
    for kind in (Reasoning, Text):
        assert "".join(part.text for part in message.parts if isinstance(part, kind)) == expected
    assert complete.text == expected[: 1 << 20]
    assert complete.text_truncated
