"""The event log of all nodes: passes every event to the listener, in order, once.

Positions have no gaps but those that compaction leaves, so a missing event is noticed at once.
Events of this node come from memory if they follow the last published position; otherwise the log
first reads the events of other nodes before them. It also reads on when another node wakes it, and
every second. A wake-up carries no events, so a lost or repeated wake-up does no harm.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import structlog

from runlane_server.core.errors import StoreUnavailable
from runlane_server.store.base import Listener, LoggedComplete, Position, StoreError
from runlane_server.store.fanout import publish_completes
from runlane_server.store.postgres.connection import FAILURES, describe
from runlane_server.store.postgres.notifier import Notifier
from runlane_server.store.postgres.pool import Pool
from runlane_server.store.postgres.queries import logged
from runlane_server.store.postgres.schema import SQL, OpenDatabase
from runlane_server.store.postgres.text import unescape

if TYPE_CHECKING:
    from runlane_server.store.postgres.connection import Connection

log = structlog.get_logger()

POLL_SECONDS = 1.0
"""Average seconds between polls for events whose wake-up was lost. The same query detects a dead
connection."""

POLL_TIMEOUT = 5.0

PAGE_EVENTS = 256
PAGE_BYTES = 2 << 20

_NO_END = (1 << 63) - 1

Fetch: TypeAlias = Callable[..., Any]


class PostgresLog:
    """The position that the listener has reached in the log, and the task that moves it on."""

    def __init__(
        self,
        opened: OpenDatabase,
        pool: Pool,
        notifier: Notifier,
        listener: Callable[[], Listener | None],
        *,
        on_work: Callable[[], None],
        on_failure: Callable[[StoreError], None],
    ) -> None:
        self.failed: StoreError | None = None
        self.position = opened.position
        self._announced = opened.position
        self.compacted = opened.compacted
        self._noted = opened.compacted.latest
        self._connector = opened.connector
        self._pool = pool
        self._notifier = notifier
        self._listener = listener
        self._on_work = on_work
        self._on_failure = on_failure
        self._store_id = opened.store_id
        self._wakeup = asyncio.Event()
        self._following = asyncio.create_task(self._follow(), name="postgres-log")

    async def close(self) -> None:
        """Stops publishing."""
        self._following.cancel()
        await asyncio.wait([self._following])

    @property
    def behind(self) -> int:
        """The number of events that other nodes announced and the listener has not received."""
        return max(0, self._announced - self.position)

    def wake(self) -> None:
        """Looks for events that the listener has not received."""
        self._wakeup.set()

    async def publish(self, own: Sequence[LoggedComplete]) -> None:
        """Publishes events of this node, after those that other nodes committed before them.

        One round trip if there is such a gap, else none. Raises StoreUnavailable; the events are
        then published later.
        """
        if own[0].position > self.position + 1:
            await self.catch_up(own[0].position - 1)
        self._advance(own)

    async def catch_up(self, upto: Position = _NO_END) -> None:
        """Publishes all committed events, at least up to a position. Raises StoreUnavailable."""
        while self.position < upto and await self._read(self._pool.fetch, upto):
            pass

    async def _read(self, fetch: Fetch, upto: Position) -> bool:
        """Reads and publishes the next page; returns whether there may be more."""
        rows = await fetch(SQL["log_after"], self.position, upto, PAGE_EVENTS, PAGE_BYTES)
        compacted: Position = rows[0]["compacted"]
        if compacted > self._noted:
            # Before an event is published that follows removed ones.
            self._noted = compacted
            for row in await fetch(SQL["tenant_logs"]):
                self.compacted.note(unescape(row["tenant"]), row["compacted"])
        events = [logged(row) for row in rows if row["position"] is not None]
        self._advance(events)
        # Events that are missing up to there were removed in the meantime. A later compaction is no
        # proof: events of other tenants may remain before those that it removed.
        end = min(upto, compacted)
        if not events and self.position < end:
            self.position = end
            publish_completes(self._listener(), ())
        return bool(events) and (rows[0]["found"] > len(rows) or len(rows) == PAGE_EVENTS)

    def _advance(self, events: Sequence[LoggedComplete]) -> None:
        """Publishes the events beyond the current position. Synchronous: events that another task
        has published during the read are skipped."""
        new = [event for event in events if event.position > self.position]
        if not new:
            return
        # The listener finds a gap only before the first event.
        for part in _without_gaps(new):
            first = part[0].position
            if first > max(self.position, self.compacted.latest) + 1:
                raise AssertionError(f"event {first} follows {self.position}")
            self.position = part[-1].position
            publish_completes(self._listener(), part)

    # Following other nodes

    async def _follow(self) -> None:
        down = False
        while self.failed is None:
            try:
                connection = await self._connector.connect()
                try:
                    if not await self._has_same_history(connection):
                        continue
                    await connection.add_listener(
                        self._connector.database.channel, self._on_notification
                    )
                    # Earlier announcements of work may have been lost.
                    self._on_work()
                    if down:
                        log.info("database available again")
                    down = False
                    await self._keep_up(connection)
                finally:
                    connection.terminate()
            except (*FAILURES, StoreUnavailable) as error:
                if not down:
                    log.warning("database unavailable", error=describe(error))
                down = True
            except Exception:
                log.exception("following the log failed")
            await asyncio.sleep(_jittered(POLL_SECONDS))

    async def _has_same_history(self, connection: Connection) -> bool:
        """Whether the database still has the store that was opened, with all published events.

        It has not after a restore, or after the failover to a standby that lagged behind. Its next
        events would have positions that are already published, and no subscriber would get them.
        """
        published = self.position
        row = await connection.fetchrow(SQL["state"])
        if row is not None and row["store_id"] == self._store_id and row["position"] >= published:
            return True
        self.failed = StoreError(
            "the database has lost events: it was restored, or a standby that lagged behind took"
            " over; stop all nodes and run 'runlane-server renew'"
        )
        log.error("store failed", reason=self.failed.message)
        self._on_failure(self.failed)
        return False

    async def _keep_up(self, connection: Connection) -> None:
        """Reads on after each wake-up, and every second. Raises when the connection is lost."""

        async def fetch(query: str, *args: object) -> Any:
            return await connection.fetch(query, *args, timeout=POLL_TIMEOUT)

        while True:
            self._wakeup.clear()
            while await self._read(fetch, _NO_END):
                pass
            try:
                async with asyncio.timeout(_jittered(POLL_SECONDS)):
                    await self._wakeup.wait()
            except TimeoutError:
                pass

    def _on_notification(
        self, _connection: object, _pid: int, _channel: str, payload: object
    ) -> None:
        wake_up = self._notifier.parse(str(payload))
        if wake_up is None:
            return
        self._announced = max(self._announced, wake_up.position)
        if wake_up.position > self.position:
            self._wakeup.set()
        if wake_up.work:
            self._on_work()


def _jittered(seconds: float) -> float:
    """Spreads the polls of many nodes."""
    return seconds * random.uniform(0.75, 1.25)  # noqa: S311 - nothing secret


def _without_gaps(events: Sequence[LoggedComplete]) -> Iterator[Sequence[LoggedComplete]]:
    """Splits a page where events of other tenants between its own were removed."""
    start = 0
    for n in range(1, len(events)):
        if events[n].position != events[n - 1].position + 1:
            yield events[start:n]
            start = n
    yield events[start:]
