"""Wake-ups among nodes: the log has new events, or there is work to do.

One notification covers everything that came up while the previous one was sent. It is never part of
a write transaction: NOTIFY takes a lock on the whole database until after the commit.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass

import structlog

from runlane_server.core.errors import StoreUnavailable
from runlane_server.store.base import BEGINNING, Position
from runlane_server.store.postgres.pool import Pool
from runlane_server.store.postgres.schema import SQL

log = structlog.get_logger()

_END: Position = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class WakeUp:
    """A message of another node: the log has events up to `position`; `work`: there is work."""

    position: Position
    work: bool


class Notifier:
    """Wakes the other nodes."""

    def __init__(self, pool: Pool, channel: str) -> None:
        self._pool = pool
        self._channel = channel
        self._sender = secrets.token_hex(8)
        self._position: Position = BEGINNING
        self._work = False
        self._due = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name="postgres-notifier")

    def announce_log(self, position: Position) -> None:
        """Announces terminal events up to a position."""
        self._position = position
        self._due.set()

    def announce_work(self) -> None:
        """Announces work that another node may do."""
        self._work = True
        self._due.set()

    def parse(self, payload: str) -> WakeUp | None:
        """Parses a notification; None if this node sent it."""
        match payload.split(" "):
            case [self._sender, _, _]:
                return None
            case [_, position, ("0" | "1") as work] if position.isdecimal():
                return WakeUp(int(position), work == "1")
            case _:
                # From a node of another version: it may mean either.
                return WakeUp(_END, work=True)

    async def close(self) -> None:
        """Stops. The other nodes find pending announcements by polling."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            await self._due.wait()
            self._due.clear()
            payload = f"{self._sender} {self._position} {self._work:d}"
            self._position, self._work = BEGINNING, False
            try:
                await self._pool.fetch(SQL["notify"], self._channel, payload)
            except StoreUnavailable:
                log.debug("wake-up lost")
            except Exception:
                log.exception("wake-up failed")
