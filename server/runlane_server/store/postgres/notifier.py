"""Wake-ups among nodes: that there is something in the log, or something to do.

One notification stands for all that came up while the last one was under way. It is never sent
within a write, as it takes a lock of the whole database until after the commit.
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
    """What another node says: the log has events up to `position`, or there is work."""

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

    def logged(self, position: Position) -> None:
        """Terminal events were committed up to a position."""
        self._position = position
        self._due.set()

    def work(self) -> None:
        """There is something to do that another node may do."""
        self._work = True
        self._due.set()

    def read(self, payload: str) -> WakeUp | None:
        """What a notification says; None if it is this node's own."""
        match payload.split(" "):
            case [self._sender, _, _]:
                return None
            case [_, position, ("0" | "1") as work] if position.isdecimal():
                return WakeUp(int(position), work == "1")
            case _:
                # Of a node of another version: it may have said either.
                return WakeUp(_END, work=True)

    async def close(self) -> None:
        """Stops. What was not said yet the others find by polling."""
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
                log.debug("a wake-up was lost")
            except Exception:
                log.exception("waking the other nodes failed")
