"""Stores the events of an agent in the log of its run, in batches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import Context, copy_context
from typing import Final

import structlog

from runlane_server.agents.base import AgentError
from runlane_server.core.errors import RunlaneError, StoreUnavailable
from runlane_server.core.limits import RETRY_PAUSE
from runlane_server.core.model import (
    EventBody,
    Folded,
    KeptPart,
    Micros,
    Reasoning,
    ReasoningDelta,
    RunEvent,
    RunKey,
    Text,
    TextDelta,
    clean_text,
    cut_utf8,
    utf8_size,
)
from runlane_server.core.transition import LaneRun
from runlane_server.core.turn import DraftMessage, TurnDraft
from runlane_server.engine.output_size import output_size
from runlane_server.engine.pulse import Pulse
from runlane_server.engine.replay import Replay
from runlane_server.store.base import Stale, Store
from runlane_server.store.retry import retry_read

log = structlog.get_logger()

DELTA_CHARS = 1 << 16
"""Maximum length of a stored delta; a longer text is split into several events."""

OUTBOX_CHARS = 1 << 18
"""The agent is paused while more than this much of its output is not stored, in characters. It is
small, as a write of this run delays the writes of all others."""

OUTBOX_EVENTS = 4096
"""The agent is paused after this many events until they are stored: bounds their memory."""

PART_BYTES = 256
"""Bytes that each part of a message counts towards the output limit, besides its content.
Otherwise many tiny parts would take far more memory than the limit suggests."""

OUTPUT_LIMIT = "OUTPUT_LIMIT"
"""Reason of a failed run: its agent emitted more than `--max-run-output`."""

_DELTAS: Final = (TextDelta, ReasoningDelta)

_FIRST_HALF_LOW, _FIRST_HALF_HIGH = "\ud800", "\udbff"
"""The range of the first halves of surrogate pairs."""


def _split(text: str) -> Sequence[str]:
    if len(text) <= DELTA_CHARS:
        return (text,)
    return [text[at : at + DELTA_CHARS] for at in range(0, len(text), DELTA_CHARS)]


def pieces_of(body: EventBody) -> Iterable[EventBody]:
    """The event, or the pieces of an oversized delta, between which the agent can be paused."""
    if isinstance(body, _DELTAS) and len(body.text) > OUTBOX_CHARS:
        return _pieces_of_text(type(body), body.text)
    return (body,)


def _pieces_of_text(kind: type[TextDelta | ReasoningDelta], text: str) -> Iterator[EventBody]:
    for at in range(0, len(text), OUTBOX_CHARS):
        yield kind(text[at : at + OUTBOX_CHARS])


class Outbox:
    """The output of an agent that is not stored yet.

    It takes at most `max_output` bytes of one attempt. Events that arrive during a write form the
    next batch, and adjacent deltas are merged. The rest is committed with the end of the run. A
    write starts at a beat of the `pulse`, so an agent that has returned by then needs none.
    """

    def __init__(
        self,
        key: RunKey,
        run: LaneRun,
        store: Store,
        now: Callable[[], Micros],
        *,
        max_output: int,
        pulse: Pulse,
    ) -> None:
        self.events = run.events
        self._max_output = max_output
        self._output = 0
        self._draft = TurnDraft()
        self._key = key
        self._attempt = run.attempt
        self._host = run.host
        self._store = store
        self._now = now
        self._pulse = pulse
        self._context: Context | None = None
        self._waiting: list[EventBody] = []
        self._pieces: list[str] = []
        self._kind: type[TextDelta | ReasoningDelta] = TextDelta
        self._is_in_text = False
        self._delta_chars = 0
        self._kept_parts = 0
        self._half = ""
        self._chars = 0
        self._puts = 0
        self._is_closed = False
        self._open = asyncio.Event()
        self._open.set()
        self._agent_task: asyncio.Task[None] | None = None
        self._on_lost: Callable[[], None] | None = None
        self._on_broken: Callable[[], None] | None = None
        self._on_stored: Callable[[int], None] | None = None
        self.stored = 0
        self._writer: asyncio.Task[None] | None = None
        self._is_scheduled = False

    def follow(
        self,
        agent_task: asyncio.Task[None],
        on_lost: Callable[[], None],
        on_broken: Callable[[], None],
    ) -> None:
        """Stores events while the agent's task runs.

        Calls `on_lost` if this node loses the run, and `on_broken` if the store cannot take an
        event. Both end the output.
        """
        self._agent_task = agent_task
        # Writes belong to the engine, so they do not run in the context of the agent.
        self._context = copy_context()
        self._on_lost = on_lost
        self._on_broken = on_broken

    def follow_stored(self, on_stored: Callable[[int], None]) -> None:
        """Stores every event on its own from now on, and calls `on_stored` with the number of the
        agent's events that are stored."""
        self._on_stored = on_stored

    def restore(self, replay: Replay) -> None:
        """Continues after the stored output of this attempt."""
        self.events = replay.events
        self.stored = replay.output_events
        self._draft = replay.draft
        self._output = replay.bytes + PART_BYTES * len(replay.messages())

    def close(self) -> None:
        """Drops all further events."""
        self._is_closed = True
        self._open.set()

    def pause(self) -> None:
        """Stores nothing until `go_on`: others write the events of the run meanwhile."""
        self._open.clear()

    def go_on(self) -> None:
        """Stores events again."""
        if not self._open.is_set():
            self._open.set()
            if self._has_more:
                self._schedule()

    @property
    def is_closed(self) -> bool:
        """Whether further events are dropped because the agent was stopped."""
        return self._is_closed

    @property
    def is_full(self) -> bool:
        """Whether the agent must pause until events are stored."""
        return self._chars > OUTBOX_CHARS or self._puts > OUTBOX_EVENTS

    def put(self, body: EventBody) -> None:
        """Adds an event of the agent that passed the check.

        Raises InvalidAgentEvent if it does not fit the turn, and AgentError (OUTPUT_LIMIT) if it
        exceeds the output limit; the text up to the limit is kept.
        """
        if self._is_closed:
            return
        self._puts += 1
        try:
            if isinstance(body, _DELTAS):
                self._put_delta(type(body), body.text)
                if self._on_stored is not None:
                    self._end_delta()
            else:
                self._put_whole(body)
        finally:
            self._schedule()

    def _put_whole(self, body: EventBody) -> None:
        """Adds an event that is stored as it is: all but deltas, which are merged."""
        self._end_half()
        self._end_delta()
        self._is_in_text = False
        size = PART_BYTES + output_size(body)
        self._check_room(size)
        self._draft.add(body)
        self._waiting.append(body)
        self._output += size
        self._chars += size

    def count_result(self, json: str) -> None:
        """Counts a structured result, which is stored with the end of the run. Raises AgentError
        (OUTPUT_LIMIT)."""
        size = PART_BYTES + utf8_size(json)
        self._check_room(size)
        self._output += size

    def _check_room(self, size: int) -> None:
        if size > self._room:
            raise self._limit_reached()

    def _schedule(self) -> None:
        """Starts a write at the next beat of the pulse."""
        if self._writer is None and not self._is_scheduled and self._agent_task is not None:
            self._is_scheduled = True
            self._pulse.call(self._start_if_needed)

    def add_stored(self, body: Folded) -> None:
        """Adds an event that was stored as part of another commit; the caller counts it."""
        self._end_half()
        self._end_delta()
        self._is_in_text = False
        self._draft.add(body)

    def messages(self) -> tuple[DraftMessage, ...]:
        """The output so far, as the messages of the turn."""
        self._end_half()
        self._end_delta()
        return self._draft.messages()

    async def flush(self) -> None:
        """Waits until all events are stored, or the agent has returned."""
        self._puts = 0
        while (self._waiting or self._pieces) and not self._has_agent_returned:
            await self._open.wait()
            if self._is_closed:
                break
            await asyncio.wait({self._writer or self._start_writing()})
        await self._wait_written()

    async def take_rest(self) -> tuple[EventBody, ...]:
        """Closes the outbox; returns the events to be stored with the end of the run."""
        self.close()
        await self._wait_written()
        self._end_half()
        self._end_delta()
        # Without a reference cycle the run is freed at once, not by the garbage collector.
        self._on_lost = self._on_broken = self._on_stored = None
        return tuple(self._waiting)

    async def _wait_written(self) -> None:
        """Waits until no write is in progress."""
        if self._writer is not None:
            await asyncio.wait({self._writer})

    def _put_delta(self, kind: type[TextDelta | ReasoningDelta], text: str) -> None:
        if not text:
            return
        if kind is not self._kind:
            self._end_half()
            self._end_delta()
            self._kind = kind
            self._is_in_text = False
        self._add_limited(self._without_last_half(self._half + text))

    def _add_limited(self, text: str) -> None:
        """Adds the text as far as the output limit allows."""
        if not self._is_in_text:
            self._is_in_text = True
            self._output += PART_BYTES
        kept, is_cut = cut_utf8(text, max(0, self._room))
        if kept:
            self._add_text(kept)
            self._output += utf8_size(kept)
        if is_cut:
            raise self._limit_reached()

    @property
    def _room(self) -> int:
        return self._max_output - self._output

    def _limit_reached(self) -> AgentError:
        return AgentError(
            f"the output of the run reached its limit of {self._max_output} bytes"
            " (--max-run-output)",
            reason=OUTPUT_LIMIT,
        )

    def _without_last_half(self, text: str) -> str:
        """Keeps back the first half of a character: a provider may send the other one next."""
        self._half = ""
        if _FIRST_HALF_LOW <= text[-1] <= _FIRST_HALF_HIGH:
            self._half = text[-1]
            text = text[:-1]
        return clean_text(text)

    def _end_half(self) -> None:
        """Gives up on the other half of a character."""
        if self._half:
            self._half = ""
            self._add_text("\ufffd")

    def _add_text(self, text: str) -> None:
        if not text:
            return  # all of it was the first half of a character
        for piece in _split(text):
            if self._delta_chars + len(piece) > DELTA_CHARS:
                self._end_delta()
            self._pieces.append(piece)
            self._delta_chars += len(piece)
        self._chars += len(text)

    def _end_delta(self) -> None:
        """Merges the collected deltas into one event."""
        if self._pieces:
            delta = self._kind("".join(self._pieces))
            self._draft.add(delta)
            self._waiting.append(delta)
            self._pieces.clear()
            self._delta_chars = 0

    def _start_if_needed(self) -> None:
        """Starts a write, unless the end of the run stores everything."""
        self._is_scheduled = False
        if self._writer is None and self._has_more:
            self._start_writing()

    @property
    def _has_more(self) -> bool:
        """Whether there is something to be stored before the end of the run."""
        has_ended = self._is_closed or self._has_agent_returned
        return self._open.is_set() and not has_ended and bool(self._pieces or self._waiting)

    def _start_writing(self) -> asyncio.Task[None]:
        loop = asyncio.get_running_loop()
        self._writer = loop.create_task(self._write(), context=self._context)
        return self._writer

    async def _write(self) -> None:
        """Stores a batch. Later events wait for the next beat."""
        try:
            if self._has_more:
                await self._append(self._batch())
                await self._keep(self._draft.take_surplus())
        except (Stale, RunlaneError) as error:
            log.warning("run lost to this node", error=str(error) or "fenced off")
            self._give_up(self._on_lost)
        except Exception:
            log.exception("output of the agent cannot be stored")
            self._give_up(self._on_broken)
        finally:
            self._writer = None
        if self._has_more:
            self._schedule()

    def _give_up(self, callback: Callable[[], None] | None) -> None:
        self.close()
        self._end_delta()
        self._waiting.clear()
        if callback is not None:
            callback()

    async def _append(self, batch: Sequence[RunEvent]) -> None:
        """Stores a batch exactly once: after an unconfirmed write it checks before it retries.
        Raises Stale."""
        while not await self._is_appended(batch):
            await asyncio.sleep(RETRY_PAUSE)
            if await self._is_stored(batch[-1]):
                break
        # Only stored events count: the end of the run is numbered after them. A lane that was read
        # meanwhile may have counted them already.
        self.events = max(self.events, batch[-1].index)
        self.stored += len(batch)
        if self._on_stored is not None:
            self._on_stored(self.stored)

    async def _keep(self, parts: Sequence[Text | Reasoning]) -> None:
        """Stores parts of a long message, so that the end of the run has little to write, and
        nothing of them stays in memory."""
        for part in parts:
            number = self._kept_parts
            while not await self._is_kept(number, part):
                await asyncio.sleep(RETRY_PAUSE)
            self._kept_parts += 1
            self._draft.replace(part, KeptPart(self._attempt, number, utf8_size(part.text)))

    async def _is_kept(self, number: int, part: Text | Reasoning) -> bool:
        """Tries to store a part once; returns whether the store confirmed it."""
        try:
            await self._store.keep_part(self._key, self._attempt, number, part, host=self._host)
        except StoreUnavailable:
            if self._store.failed is not None:
                raise
            return False
        return True

    async def _is_appended(self, batch: Sequence[RunEvent]) -> bool:
        """Tries to store a batch once; returns whether the store confirmed it."""
        try:
            await self._store.append(self._key, self._attempt, batch, host=self._host)
        except StoreUnavailable:
            if self._store.failed is not None:
                raise
            return False
        return True

    async def _is_stored(self, event: RunEvent) -> bool:
        """Whether the event is stored, and with it the batch that it ends. Raises Stale if another
        event has its place: the attempt continues on another node, or is over."""
        found = await retry_read(
            self._store,
            lambda: self._store.run_events(self._key, after=event.index - 1, limit=1, max_bytes=1),
        )
        if found and (found[0].index, found[0].at) != (event.index, event.at):
            raise Stale.attempt()
        return bool(found)

    @property
    def _has_agent_returned(self) -> bool:
        return self._agent_task is not None and self._agent_task.done()

    def _batch(self) -> list[RunEvent]:
        self._end_delta()
        at = self._now()
        batch = [
            RunEvent(self._key.run_id, self.events + n, at, body)
            for n, body in enumerate(self._waiting, start=1)
        ]
        self._waiting.clear()
        self._chars = 0
        return batch
