"""The event log as all nodes write it: who listens here is told of every event, in order, once.

Positions have no gap, so what is missing is seen at once. A node's own events come from memory
where they follow on what was told; whatever others wrote before them is read first. The events of
others are looked for when a node wakes this one, and every second anyhow. A wake-up brings nothing
but itself, so none that is lost, or comes twice, matters.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import structlog

from runlane_server.core.errors import StoreUnavailable
from runlane_server.store.base import Listener, LoggedComplete, Position, StoreError
from runlane_server.store.codec import decode_complete
from runlane_server.store.postgres.connection import FAILURES, describe
from runlane_server.store.postgres.notifier import Notifier
from runlane_server.store.postgres.pool import Pool
from runlane_server.store.postgres.schema import SQL, Opened
from runlane_server.store.postgres.text import unescape

if TYPE_CHECKING:
    from runlane_server.store.postgres.connection import Connection

log = structlog.get_logger()

POLL_SECONDS = 1.0
"""After how long it is looked for events that no wake-up told of, on average. The same query finds
out that a connection is dead."""

POLL_TIMEOUT = 5.0

PAGE_EVENTS = 256
PAGE_BYTES = 2 << 20

_NO_END = (1 << 63) - 1

Fetch: TypeAlias = Callable[..., Any]


class PostgresLog:
    """How far the listener was told of the log, and what brings it further."""

    def __init__(
        self,
        opened: Opened,
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
        """Tells nothing any more."""
        self._following.cancel()
        await asyncio.wait([self._following])

    @property
    def behind(self) -> int:
        """How many events others have announced that the listener was not told of yet."""
        return max(0, self._announced - self.position)

    def wake(self) -> None:
        """There may be events that the listener was not told of."""
        self._wakeup.set()

    def kept_from(self, compacted: Position) -> None:
        """The log was compacted up to there, by whichever node."""
        self.compacted = max(self.compacted, compacted)

    async def tell(self, own: Sequence[LoggedComplete]) -> None:
        """Tells of events that were committed here, and first of what others committed before them.

        One round trip where there is such a gap, else none. Raises StoreUnavailable; they are told
        later then.
        """
        if own[0].position > self.position + 1:
            await self.catch_up(own[0].position - 1)
        self._publish(own)

    async def catch_up(self, upto: Position = _NO_END) -> None:
        """Tells of all that is committed, up to a position at least. Raises StoreUnavailable."""
        while self.position < upto and await self._read(self._pool.fetch, upto):
            pass

    async def _read(self, fetch: Fetch, upto: Position) -> bool:
        """Reads and tells a page of what comes next; returns whether there may be more."""
        rows = await fetch(SQL["log_after"], self.position, upto, PAGE_EVENTS, PAGE_BYTES)
        self.kept_from(rows[0]["compacted"])
        events = [
            LoggedComplete(row["position"], unescape(row["tenant"]), decode_complete(row["body"]))
            for row in rows
            if row["position"] is not None
        ]
        self._publish(events)
        # What is missing up to there was removed meanwhile.
        end = min(upto, self.compacted)
        if not events and self.position < end:
            self.position = end
            self._tell(())
        return bool(events) and (rows[0]["found"] > len(rows) or len(rows) == PAGE_EVENTS)

    def _publish(self, events: Sequence[LoggedComplete]) -> None:
        """Tells of those events that come next. Synchronous: whatever was read meanwhile by
        somebody else was told by then, and is not told again."""
        new = [event for event in events if event.position > self.position]
        if not new:
            return
        if new[0].position > max(self.position, self.compacted) + 1:
            raise AssertionError(f"event {new[0].position} comes after {self.position}")
        self.position = new[-1].position
        self._tell(new)

    def _tell(self, events: Sequence[LoggedComplete]) -> None:
        listener = self._listener()
        if listener is None:
            return
        try:
            listener.on_completes(events)
        except Exception:
            # It is committed, whatever the listener makes of it.
            log.exception("the listener of the store failed")

    # Following what others write

    async def _follow(self) -> None:
        down = False
        while self.failed is None:
            try:
                connection = await self._connector.connect()
                try:
                    if not await self._is_same(connection):
                        continue
                    await connection.add_listener(self._connector.database.channel, self._heard)
                    # What was said before is not known.
                    self._on_work()
                    if down:
                        log.info("the database is back")
                    down = False
                    await self._keep_up(connection)
                finally:
                    connection.terminate()
            except (*FAILURES, StoreUnavailable) as error:
                if not down:
                    log.warning("the database is away", error=describe(error))
                down = True
            except Exception:
                log.exception("following the log failed")
            await asyncio.sleep(_about(POLL_SECONDS))

    async def _is_same(self, connection: Connection) -> bool:
        """Whether it is still the store that was opened, with all that was told of it.

        It is not after a restore, and where a standby took over that lagged behind. What comes next
        would be told under positions that are known already, which is to say not at all.
        """
        told = self.position
        row = await connection.fetchrow(SQL["state"])
        if row is not None and row["store_id"] == self._store_id and row["position"] >= told:
            return True
        self.failed = StoreError(
            "the database is not what it was: it was restored, or a standby took over that lagged"
            " behind; stop all nodes and run 'runlane-server renew'"
        )
        log.error("the store failed", reason=self.failed.message)
        self._on_failure(self.failed)
        return False

    async def _keep_up(self, connection: Connection) -> None:
        """Reads on whenever it is woken, and every second. Raises when the connection is lost."""

        async def fetch(query: str, *args: object) -> Any:
            return await connection.fetch(query, *args, timeout=POLL_TIMEOUT)

        while True:
            self._wakeup.clear()
            while await self._read(fetch, _NO_END):
                pass
            try:
                async with asyncio.timeout(_about(POLL_SECONDS)):
                    await self._wakeup.wait()
            except TimeoutError:
                pass

    def _heard(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        said = self._notifier.read(str(payload))
        if said is None:
            return
        self._announced = max(self._announced, said.position)
        if said.position > self.position:
            self._wakeup.set()
        if said.work:
            self._on_work()


def _about(seconds: float) -> float:
    """Not all nodes at the same instant."""
    return seconds * random.uniform(0.75, 1.25)  # noqa: S311 - nothing secret
