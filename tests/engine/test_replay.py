"""The output of a lost attempt, rebuilt from its events."""

from __future__ import annotations

import asyncio

import pytest

from runlane_server.core.model import (
    Accepted,
    EventBody,
    Folded,
    Reasoning,
    ReasoningDelta,
    Role,
    RunEvent,
    RunKey,
    Started,
    Text,
    TextDelta,
    ToolCall,
    ToolResult,
)
from runlane_server.core.turn import DraftMessage
from runlane_server.engine.replay import EVENTS_BYTES, Replay, Replays
from runlane_server.store.base import Store
from support.node import Node, running
from support.staging import say, script, wait

LIMIT = 100

CALL, RESULT = ToolCall("1", "look", "{}"), ToolResult("1", "look", "seen")


def replayed(*bodies: EventBody, limit: int = LIMIT) -> Replay:
    replay = Replay(limit)
    for index, body in enumerate(bodies, 1):
        replay.add(RunEvent("r", index, 0, body))
    return replay


def answer(*parts: Text | Reasoning | ToolCall) -> DraftMessage:
    return DraftMessage(Role.ASSISTANT, parts)


def test_a_later_started_event_begins_the_output_again() -> None:
    bodies = Accepted(1), Started(1), TextDelta("lost"), CALL, Started(2), CALL, RESULT
    replay = replayed(*bodies, TextDelta("ok"))
    assert replay.events == 8
    assert replay.messages() == (
        answer(CALL),
        DraftMessage(Role.TOOL, (RESULT,)),
        answer(Text("ok")),
    )


def test_output_beyond_the_limit_is_cut_and_its_events_are_counted() -> None:
    within = replayed(TextDelta("a" * 60), TextDelta("b" * 40))
    assert not within.is_cut
    beyond = replayed(TextDelta("a" * 60), TextDelta("b" * 41), ReasoningDelta("c"), CALL, RESULT)
    assert beyond.is_cut
    assert beyond.events == 5
    assert beyond.messages() == (answer(Text("a" * 60)),)


def test_a_new_attempt_after_one_beyond_the_limit_is_not_cut() -> None:
    replay = replayed(TextDelta("a" * 101), Started(2), TextDelta("b"))
    assert not replay.is_cut
    assert replay.messages() == (answer(Text("b")),)


def test_r26_a_folded_prompt_beyond_the_limit_stays_in_the_turn() -> None:
    replay = replayed(TextDelta("a" * 60), TextDelta("b" * 60), Folded("f", "r"), TextDelta("c"))
    assert replay.messages() == (
        answer(Text("a" * 60)),
        DraftMessage(Role.USER, run_id="f"),
    )


@pytest.mark.stores("memory", "sqlite", "postgresql")
async def test_large_runs_are_replayed_one_at_a_time_and_small_ones_beside_them(
    store: Store,
) -> None:
    async with running(store) as node:
        for run_id, size in (("large 1", 2), ("large 2", 2), ("small", 0)):
            await staged(node, run_id, size * EVENTS_BYTES)
        replays = Replays(store, 8 * EVENTS_BYTES)
        at_work: set[str] = set()
        most: list[set[str]] = []

        async def work(run_id: str) -> int:
            async with replays.replay(RunKey("default", run_id)) as replay:
                at_work.add(run_id)
                for _ in range(20):
                    await asyncio.sleep(0)
                most.append(set(at_work))
                await store.get_run(RunKey("default", run_id))
                at_work.discard(run_id)
                return replay.bytes

        sizes = await asyncio.gather(*map(work, ("large 1", "large 2", "small")))
        assert min(sizes[:2]) >= 2 * EVENTS_BYTES > sizes[2]
        assert all(len(together & {"large 1", "large 2"}) < 2 for together in most)
        for latch in ("large 1", "large 2", "small"):
            node.latches.open(latch)


async def staged(node: Node, run_id: str, size: int) -> None:
    """Starts a run that waits at a latch once it has stored at least `size` bytes of output."""
    count = size >> 16
    output = [say("x" * (1 << 16)), {"reasoning": "x"}] * count
    await node.accept(run_id, script(*output, wait(run_id)), run_id=run_id)
    await node.latches.reached(run_id)
    while len(await node.events(run_id)) < 2 * count:
        await asyncio.sleep(0)
