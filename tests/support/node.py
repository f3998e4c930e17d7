"""A node without the wire: the real coordinator, a real store, and the scripted agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from runlane_server.access.caller import DEFAULT_TENANT
from runlane_server.agents.base import Agent
from runlane_server.agents.scripted.agent import ScriptedAgent
from runlane_server.agents.scripted.latches import Latches
from runlane_server.core.limits import Limits
from runlane_server.core.model import (
    Message,
    Prompt,
    Run,
    RunComplete,
    RunEvent,
    RunKey,
    RunRequest,
    RunState,
    SessionKey,
    Text,
    WhenBusy,
)
from runlane_server.engine.agent_table import AgentTable
from runlane_server.engine.coordinator import Coordinator
from runlane_server.engine.reservation import Acceptance
from runlane_server.feed.feed import Feed
from runlane_server.store.base import EventFilter, Store
from support.staging import SECONDS, say, script, wait


@dataclass
class Node:
    """One node, and the calls by which tests stage runs on it."""

    store: Store
    feed: Feed
    coordinator: Coordinator
    latches: Latches

    async def accept(self, session_id: str, prompt: str, **options: Any) -> Acceptance:
        """Accepts a run; creates the session if it does not exist."""
        allow_missing = options.pop("allow_missing", True)
        run_id = options.pop("run_id", "")
        with self.coordinator.begin_accepted(session_id, run_id) as accepted:
            request = RunRequest(accepted.run_id, Prompt(prompt), **options)
            return await self.coordinator.run_accepted(
                accepted, request, allow_missing=allow_missing
            )

    async def start_blocked(self, session_id: str, latch: str, **options: Any) -> Run:
        """Accepts a run; returns once it is active and waits at a latch."""
        accepted = await self.accept(session_id, script(wait(latch)), **options)
        await self.latches.reached(latch)
        return accepted.run

    async def queue(self, session_id: str, text: str, **options: Any) -> Run:
        """Accepts a run that emits a text."""
        return (await self.accept(session_id, script(say(text)), **options)).run

    async def fold(self, session_id: str, text: str, **options: Any) -> Run:
        """Accepts a run that is folded into the active turn if possible."""
        return (await self.accept(session_id, text, when_busy=WhenBusy.FOLD, **options)).run

    async def end(self, run_id: str) -> RunComplete:
        """Waits for the end of a run; returns its terminal event."""
        run = await self.coordinator.wait_run(run_id, timeout=SECONDS)
        assert run.complete is not None, f"run {run_id} is still {run.state}"
        # Another connection can read a commit a moment before the feed learns of it.
        position = await self.store.position_of(RunKey(DEFAULT_TENANT, run_id))
        while position is not None and position > self.feed.position:
            await asyncio.sleep(0)
        return run.complete

    async def state(self, run_id: str) -> RunState:
        """The state of a run."""
        return (await self.coordinator.get_run(run_id)).state

    async def messages(self, session_id: str) -> Sequence[Message]:
        """The transcript of a session."""
        page = await self.store.list_messages(
            SessionKey(DEFAULT_TENANT, session_id), limit=1000, max_bytes=1 << 30
        )
        return page.items

    async def lines(self, session_id: str) -> list[str]:
        """The transcript of a session, as `role: text [finish reason]`."""
        return [line(message) for message in await self.messages(session_id)]

    async def events(self, run_id: str) -> Sequence[RunEvent]:
        """The events of a run so far."""
        return await self.store.run_events(
            RunKey(DEFAULT_TENANT, run_id), after=0, limit=10_000, max_bytes=1 << 30
        )

    async def completes(self) -> Sequence[RunComplete]:
        """All terminal events in the log, in order."""
        page = await self.store.completes(
            DEFAULT_TENANT, EventFilter(), after=0, limit=10_000, max_bytes=1 << 30
        )
        return [event.complete for event in page.events]


def line(message: Message) -> str:
    """A message as `role: text [finish reason]`."""
    text = "".join(part.text for part in message.parts if isinstance(part, Text))
    reason = f" [{message.finish_reason}]" if message.finish_reason else ""
    return f"{message.role}: {text}{reason}"


@asynccontextmanager
async def running(
    store: Store,
    *,
    agent: Agent | AgentTable | None = None,
    limits: Limits | None = None,
    **options: Any,
) -> AsyncIterator[Node]:
    """A node over a store that is open."""
    scripted = ScriptedAgent()
    feed = Feed(store)
    coordinator = Coordinator(
        store, agent or scripted, feed, limits or Limits(cancel_grace=SECONDS), **options
    )
    await coordinator.start()
    try:
        yield Node(store, feed, coordinator, scripted.latches)
    finally:
        feed.close()
        await coordinator.stop()
