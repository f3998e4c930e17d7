"""A run survives a store that is unavailable: no output is lost or stored twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from runlane_server.access.caller import DEFAULT_TENANT
from runlane_server.core.errors import StoreUnavailable
from runlane_server.core.model import (
    FinishReason,
    Prompt,
    RunEvent,
    RunKey,
    RunState,
    TextDelta,
)
from runlane_server.store.memory.store import MemoryStore
from support.node import Node, running
from support.staging import say, script, wait


class Shaky(MemoryStore):
    """A store that does not confirm a number of appends; `written`: they are stored nevertheless.
    Reads of prompts fail, too."""

    def __init__(self, *, written: bool, is_shared: bool = False) -> None:
        super().__init__()
        self.written = written
        self.is_shared = is_shared
        self.appends = self.prompts = 0

    async def append(
        self, key: RunKey, attempt: int, events: Sequence[RunEvent], *, host: str = ""
    ) -> None:
        if not self.appends:
            return await super().append(key, attempt, events, host=host)
        self.appends -= 1
        if self.is_shared:
            # Another node, where the attempt continues, stores the first of them in between.
            other = replace(events[0], at=events[0].at - 1, body=TextDelta("other"))
            await super().append(key, attempt, [other], host=host)
        if self.written:
            await super().append(key, attempt, events, host=host)
        raise StoreUnavailable("outcome unknown")

    async def get_prompt(self, key: RunKey) -> Prompt | None:
        if self.prompts:
            self.prompts -= 1
            raise StoreUnavailable("away")
        return await super().get_prompt(key)


async def said(node: Node, run_id: str) -> list[str]:
    return [e.body.text for e in await node.events(run_id) if isinstance(e.body, TextDelta)]


@pytest.mark.parametrize("written", [True, False])
async def test_output_is_stored_once_if_the_store_does_not_confirm_it(*, written: bool) -> None:
    async with Shaky(written=written) as store, running(store) as node:
        store.appends = 2
        accepted = await node.accept("s", script(say("one"), wait("g"), say("two")))
        run_id = accepted.run.run_id
        follower = node.feed.follow(RunKey(DEFAULT_TENANT, run_id), 0)
        while not any(isinstance(event.body, TextDelta) for event in await follower.next()):
            pass
        follower.close()
        node.latches.open("g")
        end = await node.end(run_id)
        assert (end.state, end.text) == (RunState.COMPLETED, "onetwo")
        events = await node.events(run_id)
        assert "".join(await said(node, run_id)) == "onetwo"
        assert [event.index for event in events] == list(range(1, len(events) + 1))


async def test_r33_output_in_the_place_of_another_node_is_not_taken_for_stored() -> None:
    async with Shaky(written=False, is_shared=True) as store, running(store) as node:
        store.appends = 1
        accepted = await node.accept("s", script(say("one"), wait("g"), say("two")))
        end = await node.end(accepted.run.run_id)
        assert (end.finish_reason, end.attempt) == (FinishReason.INTERRUPTED, 1)
        events = await node.events(accepted.run.run_id)
        assert [event.index for event in events] == list(range(1, len(events) + 1))
        assert await said(node, accepted.run.run_id) == ["other"]


async def test_reading_a_prompt_is_retried_while_the_store_is_unavailable() -> None:
    async with Shaky(written=False) as store, running(store) as node:
        await node.start_blocked("s", "g")
        run = await node.queue("s", "x" * 10_000)
        store.prompts = 2
        node.latches.open("g")
        assert (await node.end(run.run_id)).state is RunState.COMPLETED
        assert store.prompts == 0
