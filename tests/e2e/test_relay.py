"""A run is followed at one node and executed by another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from runlane import Client, RunComplete, RunEvent, RunHandle, RunState, Started, TextDelta
from support.server import ServerProcess, serving
from support.staging import SECONDS, at_latch, say
from support.wire import Wire

LEASE = "2s"


@dataclass
class Node:
    """A server process, and a client of it."""

    process: ServerProcess
    wire: Wire

    async def attach(self, handle: RunHandle) -> RunHandle:
        """The handle of the same run at this node."""
        return await self.wire.client.attach(handle.run_id)


@asynccontextmanager
async def a_node(url: str, *flags: str) -> AsyncIterator[Node]:
    with TemporaryDirectory() as folder:
        settings = ("--store", url, "--agent", "scripted", "--node-lease", LEASE, *flags)
        async with (
            serving(Path(folder), *settings) as process,
            Client(process.address) as client,
        ):
            yield Node(process, Wire(client))


@pytest.fixture
async def worker(postgres_url: str) -> AsyncIterator[Node]:
    """A node that executes runs."""
    async with a_node(postgres_url) as node:
        yield node


@pytest.fixture
async def front(postgres_url: str) -> AsyncIterator[Node]:
    """A node that executes no runs."""
    async with a_node(postgres_url, "--max-active-runs", "0") as node:
        yield node


async def every_event(handle: RunHandle) -> list[RunEvent]:
    """All events of a run, to its end."""
    async with asyncio.timeout(SECONDS):
        return [event async for event in handle.events()]


def output_of(events: list[RunEvent]) -> str:
    """The output of the last attempt."""
    text = ""
    for event in events:
        match event.body:
            case Started():
                text = ""
            case TextDelta(piece):
                text += piece
    return text


async def test_output_of_a_run_on_another_node_is_streamed_live(worker: Node, front: Node) -> None:
    handle = await front.wire.accept("s", *at_latch("g"), say("more"), *at_latch("h"))
    # Returns while the run still waits at the latch.
    await front.wire.wait_for_latch(handle, "g")
    following = asyncio.create_task(every_event(handle))
    await worker.wire.open_latch("g")
    await front.wire.wait_for_latch(handle, "h")
    await worker.wire.open_latch("h")
    there, here = await every_event(await worker.attach(handle)), await following
    assert here == there
    assert [event.index for event in here] == list(range(1, len(here) + 1))
    assert output_of(here) == "<g>more<h>"


async def test_many_deltas_are_relayed_once_and_in_order(worker: Node, front: Node) -> None:
    pieces = [f"{number} " for number in range(500)]
    handle = await front.wire.accept("s", *at_latch("g"), *map(say, pieces))
    await front.wire.wait_for_latch(handle, "g")
    followers = [asyncio.create_task(every_event(handle)) for _ in range(5)]
    await worker.wire.open_latch("g")
    all_of_them = await asyncio.gather(*followers)
    assert {output_of(events) for events in all_of_them} == {"<g>" + "".join(pieces)}
    for events in all_of_them:
        assert [event.index for event in events] == list(range(1, len(events) + 1))
        assert isinstance(events[-1].body, RunComplete)


async def test_a_waiting_run_is_streamed_once_it_starts(worker: Node, front: Node) -> None:
    first = await front.wire.start_blocked("s", "g")
    second = await front.wire.accept("s", *at_latch("h"))
    reached = asyncio.create_task(front.wire.wait_for_latch(second, "h"))
    await worker.wire.open_latch("g")
    await first.completed(SECONDS)
    await reached
    await worker.wire.open_latch("h")
    assert (await second.completed(SECONDS)).text == "<h>"


async def test_r17_a_stream_follows_its_run_to_another_node(
    worker: Node, front: Node, postgres_url: str
) -> None:
    handle = await front.wire.accept("s", *at_latch("g"), max_attempts=2)
    await front.wire.wait_for_latch(handle, "g")
    following = asyncio.create_task(every_event(handle))
    await worker.process.kill()
    async with a_node(postgres_url) as second:
        # The first attempt emitted the same text.
        await second.wire.wait_for_latch(await second.attach(handle), "g")
        await second.wire.open_latch("g")
        events = await following
    attempts = [event.body.attempt for event in events if isinstance(event.body, Started)]
    assert attempts == [1, 2]
    assert [event.index for event in events] == list(range(1, len(events) + 1))
    assert isinstance(events[-1].body, RunComplete)
    assert (events[-1].body.state, output_of(events)) == (RunState.COMPLETED, "<g>")


async def test_output_of_an_unreachable_node_is_read_from_the_store(
    postgres_url: str, front: Node
) -> None:
    async with AsyncExitStack() as nodes:
        nowhere = a_node(postgres_url, "--node-address", "127.0.0.1:1")
        away = await nodes.enter_async_context(nowhere)
        handle = await front.wire.accept("s", *at_latch("g"), *at_latch("h"))
        await front.wire.wait_for_latch(handle, "g")
        following = asyncio.create_task(front.wire.wait_for_latch(handle, "h"))
        await away.wire.open_latch("g")
        await following
        await away.wire.open_latch("h")
        assert (await handle.completed(SECONDS)).text == "<g><h>"
