"""What an agent said and what of it is stored: the way of its events into the log of its run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from runlane_server.core.errors import RunlaneError
from runlane_server.core.model import (
    EventBody,
    Folded,
    Micros,
    ReasoningDelta,
    RunEvent,
    RunKey,
    TextDelta,
    ToolCall,
    ToolResult,
    clean_text,
    cut_utf8,
)
from runlane_server.core.transition import LaneRun
from runlane_server.core.turn import InvalidAgentEvent, TurnDraft
from runlane_server.store.base import Stale, Store

log = structlog.get_logger()

DELTA_CHARS = 1 << 16
"""A delta that grew this long is an event of its own; what comes next begins another."""

OUTBOX_CHARS = 1 << 20
"""The agent is held while this much of what it said is not stored."""


MAX_TOOL_BYTES = 1 << 20
"""The arguments of a tool call are refused above this, the content of a result is cut there."""

MAX_LABEL_CHARS = 1024
"""The name of a tool, and the id of a call, are refused above this."""


def storable(body: EventBody) -> EventBody:
    """What an agent said, as it can be stored and sent: Unicode text of a bounded size.

    Raises InvalidAgentEvent for a tool call that is too large: half an object is none.
    """
    match body:
        case TextDelta(text) | ReasoningDelta(text):
            clean = clean_text(text)
            return body if clean is text else type(body)(clean)
        case ToolCall(call_id, name, arguments):
            if len(arguments.encode(errors="replace")) > MAX_TOOL_BYTES:
                raise InvalidAgentEvent(f"the arguments of {name!r} are larger than 1 MiB")
            return ToolCall(_label(call_id), _label(name), clean_text(arguments))
        case ToolResult(call_id, name, content, is_error):
            cut, _ = cut_utf8(clean_text(content), MAX_TOOL_BYTES)
            return ToolResult(_label(call_id), _label(name), cut, is_error)
        case _:
            return body


def _label(text: str) -> str:
    if len(text) > MAX_LABEL_CHARS:
        raise InvalidAgentEvent(f"a tool's name or call id has {len(text)} characters")
    return clean_text(text)


class Outbox:
    """What the agent said and is not stored yet.

    While one write is under way what comes next gathers, and neighbouring deltas become one. What
    is left when the agent returns is committed with the end of the run.
    """

    def __init__(self, key: RunKey, run: LaneRun, store: Store, now: Callable[[], Micros]) -> None:
        self.draft = TurnDraft()
        self.events = run.events
        self._key = key
        self._attempt = run.attempt
        self._store = store
        self._now = now
        self._waiting: list[EventBody] = []
        self._pieces: list[str] = []
        self._kind: type[TextDelta | ReasoningDelta] = TextDelta
        self._held = 0
        self._chars = 0
        self._closed = False
        self._work: asyncio.Task[None] | None = None
        self._on_lost: Callable[[], None] | None = None
        self._writer: asyncio.Task[None] | None = None

    def follow(self, work: asyncio.Task[None], on_lost: Callable[[], None]) -> None:
        """Begins to store while that task runs; tells when the run turns out to be lost."""
        self._work = work
        self._on_lost = on_lost

    def close(self) -> None:
        """Takes in nothing more."""
        self._closed = True

    @property
    def closed(self) -> bool:
        """Whether what the agent says is dropped, as it was told to stop."""
        return self._closed

    @property
    def full(self) -> bool:
        """Whether the agent is to be held."""
        return self._chars > OUTBOX_CHARS

    def put(self, body: EventBody) -> None:
        """Takes in what the agent said; raises InvalidAgentEvent."""
        if self._closed:
            return
        body = storable(body)
        if isinstance(body, TextDelta | ReasoningDelta):
            self._put_delta(body)
        else:
            self.draft.add(body)
            self._end_delta()
            self._waiting.append(body)
        if self._writer is None and self._work is not None:
            self._writer = asyncio.create_task(self._write())

    def note(self, body: Folded) -> None:
        """Takes in what was stored already, as part of another commit."""
        self.draft.add(body)
        self.events += 1

    async def emptied(self) -> None:
        """Returns when all that was taken in is stored, or never will be."""
        while (self._waiting or self._pieces) and not self._finished:
            if self._writer is None:
                self._writer = asyncio.create_task(self._write())
            await asyncio.wait({self._writer})
        await self._written()

    async def take_rest(self) -> tuple[EventBody, ...]:
        """What is left to be stored with the end of the run."""
        self.close()
        await self._written()
        self._end_delta()
        return tuple(self._waiting)

    async def _written(self) -> None:
        """Returns when no write is under way."""
        if self._writer is not None:
            await asyncio.wait({self._writer})

    def _put_delta(self, body: TextDelta | ReasoningDelta) -> None:
        if not body.text:
            return
        self.draft.add(body)
        if type(body) is not self._kind:
            self._end_delta()
            self._kind = type(body)
        for at in range(0, len(body.text), DELTA_CHARS):
            piece = body.text[at : at + DELTA_CHARS]
            if self._held + len(piece) > DELTA_CHARS:
                self._end_delta()
            self._pieces.append(piece)
            self._held += len(piece)
        self._chars += len(body.text)

    def _end_delta(self) -> None:
        if self._pieces:
            self._waiting.append(self._kind("".join(self._pieces)))
            self._pieces.clear()
            self._held = 0

    async def _write(self) -> None:
        """Stores what gathers, until nothing is left or the agent has returned."""
        try:
            while (self._pieces or self._waiting) and not self._finished:
                await self._store.append(self._key, self._attempt, self._batch())
        except (Stale, RunlaneError) as error:
            log.warning("the run is lost to this node", error=str(error) or "fenced off")
            self.close()
            self._waiting.clear()
            self._pieces.clear()
            if self._on_lost is not None:
                self._on_lost()
        finally:
            self._writer = None

    @property
    def _finished(self) -> bool:
        return self._work is not None and self._work.done()

    def _batch(self) -> list[RunEvent]:
        self._end_delta()
        at = self._now()
        batch = [
            RunEvent(self._key.run_id, self.events + n, at, body)
            for n, body in enumerate(self._waiting, start=1)
        ]
        self.events += len(batch)
        self._waiting.clear()
        self._chars = 0
        return batch
