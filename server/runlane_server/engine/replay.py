"""Rebuilds the output of a lost attempt from its stored events, in bounded memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext

from runlane_server.core.artifact import ArtifactPiece
from runlane_server.core.model import (
    CustomEvent,
    Folded,
    ReasoningDelta,
    RunEvent,
    RunKey,
    Started,
    StepResult,
    TextDelta,
    ToolCall,
    ToolResult,
)
from runlane_server.core.turn import DraftMessage, TurnDraft
from runlane_server.engine.output_size import output_size
from runlane_server.store.base import Store

EVENTS_PAGE = 1000

_OUTPUT = (
    TextDelta,
    ReasoningDelta,
    ToolCall,
    ToolResult,
    ArtifactPiece,
    CustomEvent,
    StepResult,
)
"""The events that an agent emits; a worker numbers them."""

EVENTS_BYTES = 1 << 18
"""The size of a page of events, and the size of the output of a small run."""


class Replay:
    """The output of the last attempt that the events so far show: its messages as a `draft`, the
    number of the agent's own events, and the runs that were folded in.

    Of an attempt with more than `max_output` bytes, which only earlier versions and higher limits
    allowed, it keeps the beginning.
    """

    def __init__(self, max_output: int) -> None:
        self.events = 0
        self.output_events = 0
        self.folded: list[str] = []
        self.bytes = 0
        self._max_output = max_output
        self.draft = TurnDraft()

    @property
    def is_cut(self) -> bool:
        """Whether it has not kept everything."""
        return self.bytes > self._max_output

    def messages(self) -> tuple[DraftMessage, ...]:
        """The messages of the turn."""
        return self.draft.messages()

    def add(self, event: RunEvent) -> None:
        """Adds the next event."""
        self.events = event.index
        if isinstance(event.body, Started):
            self.draft = TurnDraft()
            self.bytes = self.output_events = 0
            self.folded.clear()
            return
        if isinstance(event.body, Folded):
            self.folded.append(event.body.run_id)
        elif isinstance(event.body, _OUTPUT):
            self.output_events += 1
        self.bytes += output_size(event.body)
        # A folded run belongs to the turn in any case: its prompt stands nowhere else.
        if not self.is_cut or isinstance(event.body, Folded):
            self.draft.add(event.body)


class Replays:
    """Replays many runs at a time, of which at most one is large."""

    def __init__(self, store: Store, max_output: int) -> None:
        self._store = store
        self._max_output = max_output
        self._large = asyncio.Lock()

    @asynccontextmanager
    async def replay(self, key: RunKey) -> AsyncIterator[Replay]:
        """Reads the events of a run; a large one keeps others waiting until its end is written."""
        replay = Replay(self._max_output)
        while more := await self._add_page(key, replay):
            if replay.bytes >= EVENTS_BYTES:
                break
        async with self._large if more else nullcontext():
            while more:
                more = await self._add_page(key, replay)
            yield replay

    async def _add_page(self, key: RunKey, replay: Replay) -> bool:
        page = await self._store.run_events(
            key, after=replay.events, limit=EVENTS_PAGE, max_bytes=EVENTS_BYTES
        )
        for event in page:
            replay.add(event)
        return bool(page)
