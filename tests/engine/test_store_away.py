"""A run outlives a store that is away for a while: nothing it said is lost, or there twice."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from runlane_server.access.caller import DEFAULT_TENANT
from runlane_server.core.errors import StoreUnavailable
from runlane_server.core.model import (
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
    """Does not confirm so many appends: `written` says whether they were carried out all the same.
    Reads of prompts fail, too."""

    def __init__(self, *, written: bool) -> None:
        super().__init__()
        self.written = written
        self.appends = self.prompts = 0

    async def append(self, key: RunKey, attempt: int, events: Sequence[RunEvent]) -> None:
        if not self.appends:
            return await super().append(key, attempt, events)
        self.appends -= 1
        if self.written:
            await super().append(key, attempt, events)
        raise StoreUnavailable("outcome unknown")

    async def get_prompt(self, key: RunKey) -> Prompt | None:
        if self.prompts:
            self.prompts -= 1
            raise StoreUnavailable("away")
        return await super().get_prompt(key)


async def said(node: Node, run_id: str) -> list[str]:
    return [e.body.text for e in await node.events(run_id) if isinstance(e.body, TextDelta)]


@pytest.mark.parametrize("written", [True, False])
async def test_what_was_said_is_stored_once(*, written: bool) -> None:
    async with Shaky(written=written) as store, running(store) as node:
        store.appends = 2
        accepted = await node.accept("s", script(say("one"), wait("g"), say("two")))
        run_id = accepted.run.run_id
        follower = node.feed.follow(RunKey(DEFAULT_TENANT, run_id), 0)
        while not any(isinstance(event.body, TextDelta) for event in await follower.next()):
            pass
        follower.close()
        node.gates.open("g")
        end = await node.end(run_id)
        assert (end.state, end.text) == (RunState.COMPLETED, "onetwo")
        events = await node.events(run_id)
        assert "".join(await said(node, run_id)) == "onetwo"
        assert [event.index for event in events] == list(range(1, len(events) + 1))


async def test_a_prompt_that_cannot_be_read_for_a_while_is_read_later() -> None:
    async with Shaky(written=False) as store, running(store) as node:
        await node.blocked("s", "g")
        run = await node.queue("s", "x" * 10_000)
        store.prompts = 2
        node.gates.open("g")
        assert (await node.end(run.run_id)).state is RunState.COMPLETED
        assert store.prompts == 0
