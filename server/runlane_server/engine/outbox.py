"""What an agent said and what of it is stored: the way of its events into the log of its run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from runlane_server.core.errors import RunlaneError, StoreUnavailable
from runlane_server.core.limits import RETRY_PAUSE
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
from runlane_server.core.turn import DraftMessage, InvalidAgentEvent, TurnDraft
from runlane_server.store.base import Stale, Store
from runlane_server.store.retry import retry_read

log = structlog.get_logger()

DELTA_CHARS = 1 << 16
"""A delta that grew this long is an event of its own; what comes next begins another."""

OUTBOX_CHARS = 1 << 20
"""The agent is held while this much of what it said is not stored."""


MAX_TOOL_BYTES = 1 << 20
"""The arguments of a tool call are refused above this, the content of a result is cut there."""

MAX_LABEL_CHARS = 1024
"""The name of a tool, and the id of a call, are refused above this."""

_DELTAS: Final = (TextDelta, ReasoningDelta)


def _storable(body: EventBody) -> EventBody:
    """What an agent did, as it can be stored and sent: Unicode text of a bounded size.

    Raises InvalidAgentEvent for a tool call that is too large: half an object is none.
    """
    match body:
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


def _cut(text: str) -> Sequence[str]:
    if len(text) <= DELTA_CHARS:
        return (text,)
    return [text[at : at + DELTA_CHARS] for at in range(0, len(text), DELTA_CHARS)]


class Outbox:
    """What the agent said and is not stored yet.

    While one write is under way what comes next gathers, and neighbouring deltas become one. What
    is left when the agent returns is committed with the end of the run: the first write begins when
    the event loop comes round, and for an agent that has returned by then there is none.
    """

    def __init__(self, key: RunKey, run: LaneRun, store: Store, now: Callable[[], Micros]) -> None:
        self.events = run.events
        self._draft = TurnDraft()
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
        self._called = False

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
        if isinstance(body, _DELTAS):
            self._put_delta(type(body), clean_text(body.text))
        else:
            body = _storable(body)
            self._end_delta()
            self._draft.add(body)
            self._waiting.append(body)
        if self._writer is None and not self._called and self._work is not None:
            self._called = True
            asyncio.get_running_loop().call_soon(self._begin)

    def note(self, body: Folded) -> None:
        """Takes in what was stored already, as part of another commit."""
        self._end_delta()
        self._draft.add(body)
        self.events += 1

    def messages(self) -> tuple[DraftMessage, ...]:
        """What was said so far, as the messages of the turn."""
        self._end_delta()
        return self._draft.messages()

    async def emptied(self) -> None:
        """Returns when all that was taken in is stored, or never will be."""
        while (self._waiting or self._pieces) and not self._finished:
            await asyncio.wait({self._writer or self._begin_to_write()})
        await self._written()

    async def take_rest(self) -> tuple[EventBody, ...]:
        """What is left to be stored with the end of the run."""
        self.close()
        await self._written()
        self._end_delta()
        # Without a circle of references a run is freed at its end, and not by the collector.
        self._on_lost = None
        return tuple(self._waiting)

    async def _written(self) -> None:
        """Returns when no write is under way."""
        if self._writer is not None:
            await asyncio.wait({self._writer})

    def _put_delta(self, kind: type[TextDelta | ReasoningDelta], text: str) -> None:
        if not text:
            return
        if kind is not self._kind:
            self._end_delta()
            self._kind = kind
        for piece in _cut(text):
            if self._held + len(piece) > DELTA_CHARS:
                self._end_delta()
            self._pieces.append(piece)
            self._held += len(piece)
        self._chars += len(text)

    def _end_delta(self) -> None:
        """Makes one event of the deltas that gathered; the draft need not see them singly."""
        if self._pieces:
            delta = self._kind("".join(self._pieces))
            self._draft.add(delta)
            self._waiting.append(delta)
            self._pieces.clear()
            self._held = 0

    def _begin(self) -> None:
        """Begins to write, unless the end of the run takes all along that has gathered."""
        self._called = False
        if self._writer is None and not (self._closed or self._finished):
            self._begin_to_write()

    def _begin_to_write(self) -> asyncio.Task[None]:
        self._writer = asyncio.create_task(self._write())
        return self._writer

    async def _write(self) -> None:
        """Stores what gathers, until nothing is left or the agent has returned."""
        try:
            while (self._pieces or self._waiting) and not self._finished:
                await self._append(self._batch())
        except (Stale, RunlaneError) as error:
            log.warning("the run is lost to this node", error=str(error) or "fenced off")
            self.close()
            self._end_delta()
            self._waiting.clear()
            if self._on_lost is not None:
                self._on_lost()
        finally:
            self._writer = None

    async def _append(self, batch: Sequence[RunEvent]) -> None:
        """Stores a batch, once: one that the store did not confirm is looked up before it is sent
        again."""
        while True:
            try:
                await self._store.append(self._key, self._attempt, batch)
            except StoreUnavailable:
                if self._store.failed is not None:
                    raise
            else:
                return
            await asyncio.sleep(RETRY_PAUSE)
            if await self._is_stored(batch[0]):
                return

    async def _is_stored(self, event: RunEvent) -> bool:
        found = await retry_read(
            self._store,
            lambda: self._store.run_events(self._key, after=event.index - 1, limit=1, max_bytes=1),
        )
        return bool(found)

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
