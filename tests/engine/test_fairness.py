"""Agents that never await leave the event loop to others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator

import pytest

from runlane_server.agents.base import AgentEvent, Report, Turn
from runlane_server.core.limits import Limits
from runlane_server.core.model import NO_USAGE, Prompt, ReasoningDelta, RunState, TextDelta
from runlane_server.engine.attempt_output import EVENT_CHARS, SLICE_EVENTS
from runlane_server.store.base import Store
from support.node import running
from support.staging import SECONDS

pytestmark = pytest.mark.stores("memory", "sqlite")

MANY = 40 * SLICE_EVENTS

Events = Callable[[], Iterator[AgentEvent]]


def reports() -> Iterator[AgentEvent]:
    for _ in range(MANY):
        yield Report(usage=NO_USAGE)


def empty_deltas() -> Iterator[AgentEvent]:
    for _ in range(MANY):
        yield TextDelta("")


def small_deltas() -> Iterator[AgentEvent]:
    for _ in range(MANY):
        yield ReasoningDelta("x")


def mixed() -> Iterator[AgentEvent]:
    for _ in range(MANY // 2):
        yield Report(model="m")
        yield TextDelta("")


class Eager:
    """Yields all events without awaiting; `longest` is the most in one iteration of the loop."""

    def __init__(self, events: Events, *, emits: bool = False) -> None:
        self._events = events
        self._emits = emits
        self.started = asyncio.Event()
        self.has_finished = False
        self.longest = 0
        self._in_iteration = 0

    async def start(self) -> None:
        """Is ready at once."""

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Yields or emits the events."""
        loop = asyncio.get_running_loop()
        self.started.set()
        loop.call_soon(self._next_iteration, loop)
        for event in self._events():
            self._in_iteration += 1
            self.longest = max(self.longest, self._in_iteration)
            if self._emits:
                await turn.emit(event)
            else:
                yield event
        self.has_finished = True

    def _next_iteration(self, loop: asyncio.AbstractEventLoop) -> None:
        self._in_iteration = 0
        loop.call_soon(self._next_iteration, loop)

    async def close(self) -> None:
        """Has nothing to free."""


@pytest.mark.parametrize("emits", [False, True])
@pytest.mark.parametrize("events", [reports, empty_deltas, small_deltas, mixed])
async def test_an_agent_that_never_awaits_has_a_slice_of_each_iteration_of_the_loop(
    store: Store, events: Events, emits: bool
) -> None:
    agent = Eager(events, emits=emits)
    async with running(store, agent=agent) as node:
        complete = await node.coordinator.run("s", Prompt("x"))
    assert complete.state is RunState.COMPLETED
    # The first iteration of the counter comes within the second slice.
    assert SLICE_EVENTS - 1 <= agent.longest <= 2 * SLICE_EVENTS


async def test_a_slice_of_long_texts_has_fewer_events(store: Store) -> None:
    def long_deltas() -> Iterator[AgentEvent]:
        for _ in range(40):
            yield TextDelta("x" * (SLICE_EVENTS * EVENT_CHARS // 4))

    agent = Eager(long_deltas)
    async with running(store, agent=agent) as node:
        await node.coordinator.run("s", Prompt("x"))
    assert agent.longest <= 8


@pytest.mark.parametrize("events", [reports, empty_deltas, small_deltas, mixed])
async def test_r10_a_cancel_reaches_an_agent_that_never_awaits(
    store: Store, events: Events
) -> None:
    agent = Eager(events)
    async with running(store, agent=agent, limits=Limits(cancel_grace=SECONDS)) as node:
        run = (await node.accept("s", "x")).run
        await agent.started.wait()
        await node.coordinator.cancel("s")
        assert (await node.end(run.run_id)).state is RunState.CANCELLED
    assert not agent.has_finished
