"""Delivers for one webhook: in order within a session, sessions beside each other.

The memory between the log and the endpoint is bounded: `WINDOW` events, of `WINDOW_BYTES`, that
were read and not yet delivered, and `MAX_HELD` sessions whose next event has failed. Of a held
session only a place in the log is kept. Its events are read again when its retry is due, while
others go on.

The cursor is the place up to which every event was delivered, does not match, or belongs to a held
session; it is stored with these, at most `SAVE_SECONDS` later. A crash repeats what was delivered
since, with the same ids, in the same order within each session.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from runlane_server.core.errors import CursorCompacted
from runlane_server.core.model import RunKey
from runlane_server.store.webhooks import RUN_ENDED, Held, Place, Progress, Webhook
from runlane_server.webhooks.attempts import CONCURRENCY, POLL_SECONDS, SECOND, Attempts, Parts
from runlane_server.webhooks.log_reader import Entry, LogReader, session_entries

WINDOW = 1_000
WINDOW_BYTES = 4 << 20
MAX_HELD = 1_000

SAVE_SECONDS = 0.5


class Delivery:
    """The deliveries for one webhook, from its stored progress on."""

    def __init__(self, webhook: Webhook, parts: Parts, is_leased: Callable[[], bool]) -> None:
        self.webhook = webhook
        self._parts = parts
        self._schedule = parts.schedule
        self._is_over = asyncio.Event()
        self._attempts = Attempts(
            webhook,
            parts,
            is_leased=is_leased,
            on_change=self._on_change,
            on_return=self._on_return,
            on_end=self._is_over.set,
        )
        self._held = {held.session_id: held for held in webhook.progress.held}
        self._scanned = webhook.progress.cursor
        # Of a webhook of a run: whether the scan has passed the end of it, and a place beyond it.
        self._has_read_end = False
        self._beyond_end: Place | None = None
        self._outstanding: dict[Place, Place] = {}
        self._bytes = 0
        self._queues: dict[str, deque[Entry]] = {}
        # Held sessions whose next entries the scan has passed, and those at work.
        self._behind: set[str] = set()
        self._retrying: set[str] = set()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._is_dirty = False
        self._look_at = time.monotonic() + parts.lifetime.look
        self._failure: BaseException | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def progress(self) -> Progress:
        """How far it is now."""
        cursor = next(iter(self._outstanding.values()), self._scanned)
        return replace(self._attempts.progress, cursor=cursor, held=tuple(self._held.values()))

    async def run(self) -> None:
        """Delivers until it is cancelled, the webhook is disabled or over, or another node has it.

        Raises what went wrong on this side, such as StoreUnavailable.
        """
        try:
            self._start(self._work())
            while not self._is_over.is_set():
                await _within(SAVE_SECONDS, self._is_over)
                if self._failure is not None:
                    raise self._failure
                await self._save()
                if await self._has_lived():
                    self._is_over.set()
        finally:
            await self._stop()

    async def _has_lived(self) -> bool:
        """Deletes the webhook of a run that has nothing left to deliver; returns whether it did."""
        if not self.webhook.run_id or self._outstanding or self._held:
            return False
        if self._has_read_end:
            return await self._parts.store.webhooks.delete(self.webhook.key)
        if time.monotonic() <= self._look_at:
            return False
        self._look_at = time.monotonic() + self._parts.lifetime.look
        is_confirmed = self._is_confirmed
        if not await is_over(self.webhook, self._parts, is_confirmed=is_confirmed):
            self._beyond_end = None
            return False
        if is_confirmed and not await self._is_beyond_end():
            return False
        return await self._parts.store.webhooks.delete(self.webhook.key)

    async def _is_beyond_end(self) -> bool:
        """Whether the scan has passed all that was in the log once the run had ended, and nothing
        of it is left: the end may have come long ago, and nobody delivered meanwhile."""
        if self._beyond_end is None:
            await self._parts.store.catch_up()
            self._beyond_end = Place(self._parts.store.position)
        is_passed = self._scanned >= self._beyond_end
        return is_passed and not self._outstanding and not self._held

    @property
    def _is_confirmed(self) -> bool:
        return not self._parts.challenges or self._attempts.progress.confirmed == self.webhook.url

    async def _work(self) -> None:
        if not self._is_confirmed:
            await self._attempts.confirm()
        self._start(self._retry())
        await self._scan()

    async def _stop(self) -> None:
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._save()

    async def _save(self) -> None:
        if not self._is_dirty:
            return
        self._is_dirty = False
        key, fence = self.webhook.key, self.webhook.fence
        if not await self._parts.store.webhooks.save(key, fence, self.progress):
            self._is_over.set()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = error
            self._is_over.set()

    # Reading the log

    async def _scan(self) -> None:
        reader = self._reader()
        try:
            while True:
                try:
                    entries = await reader.next(POLL_SECONDS)
                except CursorCompacted:
                    reader.close()
                    reader = self._reader()
                    continue
                for entry in entries:
                    await self._take(entry)
                self._advance(reader.place)
        finally:
            reader.close()

    def _reader(self) -> LogReader:
        compacted = self._parts.store.compacted_of(self.webhook.key.tenant)
        if self._scanned.position < compacted:
            self._attempts.note_lost()
            self._scanned = Place(compacted)
        parts = self._parts
        key, wanted = self.webhook.key, self.webhook.wanted
        return LogReader(
            parts.store,
            parts.feed,
            key.tenant,
            wanted,
            after=self._scanned,
            last_input=parts.last_input,
            run_id=self.webhook.run_id,
        )

    async def _take(self, entry: Entry) -> None:
        """Passes an entry on, once there is room."""
        while (
            len(self._outstanding) >= WINDOW
            or self._bytes >= WINDOW_BYTES
            or len(self._held) >= MAX_HELD
        ):
            self._room.clear()
            await self._room.wait()
        matches = await self._matches(entry)
        self._advance(entry.place)
        if self.webhook.run_id and entry.kind == RUN_ENDED:
            self._has_read_end = True
        if not matches:
            return
        session = entry.session_id
        if session in self._held:
            self._behind.add(session)
            return
        self._outstanding[entry.place] = entry.before
        self._bytes += entry.size
        queue = self._queues.get(session)
        if queue is None:
            self._queues[session] = deque([entry])
            self._start(self._deliver_queue(session))
        else:
            queue.append(entry)

    def _advance(self, place: Place) -> None:
        if place > self._scanned:
            self._scanned = place
            self._is_dirty = True

    async def _matches(self, entry: Entry) -> bool:
        wanted = self.webhook.wanted
        if not self.webhook.matches(entry.kind, entry.body):
            return False
        if not wanted.reads_runs:
            return True
        run = await self._parts.store.get_run(RunKey(self.webhook.key.tenant, entry.run_id))
        # Without a run its session was deleted: better once too often than never.
        return run is None or wanted.matches_run(run)

    # Delivering

    async def _deliver_queue(self, session: str) -> None:
        """Delivers what was read of a session, until there is no more or one fails."""
        queue = self._queues[session]
        while queue:
            entry = queue[0]
            if not await self._attempts.deliver(entry):
                self._hold(session, Held(session, entry.before, 0, 0, 0))
                for left in queue:
                    self._settle(left)
                self._behind.add(session)
                break
            queue.popleft()
            self._settle(entry)
        del self._queues[session]

    def _settle(self, entry: Entry) -> None:
        del self._outstanding[entry.place]
        self._bytes -= entry.size
        self._is_dirty = True
        self._room.set()

    def _hold(self, session: str, held: Held) -> None:
        now = self._parts.now()
        failures = held.failures + 1
        due = now + int(self._schedule.delay(failures) * SECOND)
        since = held.since if held.failures else now
        self._held[session] = replace(held, failures=failures, due=due, since=since)
        self._is_dirty = True
        self._changed.set()

    # Retries

    async def _retry(self) -> None:
        """Starts the retries of held sessions when they are due, the longest due first."""
        while True:
            self._changed.clear()
            now = self._parts.now()
            waiting = [it for it in self._held.values() if it.session_id not in self._retrying]
            due = sorted((it for it in waiting if it.due <= now), key=lambda it: it.due)
            # Each reads a page before it waits for a slot, so that no more may run than there are.
            for held in due[: CONCURRENCY - len(self._retrying)]:
                self._retrying.add(held.session_id)
                self._start(self._catch_up(held.session_id))
            later = min((it.due for it in waiting if it.due > now), default=now + 60 * SECOND)
            await _within((later - now) / SECOND, self._changed)

    async def _catch_up(self, session: str) -> None:
        """Delivers the events of a held session, until it has none or one fails."""
        try:
            while await self._deliver_held(session):
                pass
        finally:
            self._retrying.discard(session)
            self._changed.set()
            self._room.set()

    async def _deliver_held(self, session: str) -> bool:
        """Delivers the next page of a held session; returns whether to go on."""
        held = self._held[session]
        compacted = self._parts.store.compacted_of(self.webhook.key.tenant)
        if held.after.position < compacted:
            self._attempts.note_lost()
            held = self._held[session] = replace(held, after=Place(compacted), failures=0)
        self._behind.discard(session)
        entries = await session_entries(
            self._parts.store,
            self.webhook.key.tenant,
            session,
            after=held.after,
            upto=self._scanned,
        )
        for entry in entries:
            if await self._matches(entry) and not await self._attempts.deliver(entry):
                held = self._held[session]
                if not self._gives_up(held):
                    self._hold(session, held)
                    return False
            self._held[session] = replace(held, after=entry.place, failures=0)
            held = self._held[session]
            self._is_dirty = True
        if not entries and session not in self._behind:
            if held.after > self._scanned:
                # The scan began again before it, and must not pass its events a second time.
                self._hold(session, replace(held, failures=0))
                return False
            del self._held[session]
            self._is_dirty = True
            return False
        return True

    def _gives_up(self, held: Held) -> bool:
        """Whether the event of a held session was tried often enough."""
        success = self._attempts.progress.last_success_at
        if held.failures < len(self._schedule.delays) or success is None or success < held.since:
            return False
        self._attempts.note_given_up(held.session_id)
        return True

    def _on_change(self) -> None:
        self._is_dirty = True

    def _on_return(self) -> None:
        """The endpoint is back: what waits for it goes out now."""
        for session, held in self._held.items():
            self._held[session] = replace(held, due=0)
        self._changed.set()


async def is_over(webhook: Webhook, parts: Parts, *, is_confirmed: bool) -> bool:
    """Whether the time of a webhook of a run is over."""
    run = await parts.store.get_run(RunKey(webhook.key.tenant, webhook.run_id))
    return parts.lifetime.is_over(webhook, run, confirmed=is_confirmed, now=parts.now())


async def _within(seconds: float, event: asyncio.Event) -> None:
    """Waits for an event, up to a number of seconds."""
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            await event.wait()
    except TimeoutError:
        pass
