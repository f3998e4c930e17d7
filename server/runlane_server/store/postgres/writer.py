"""The writer of a node: commits pending units in batches, over several connections.

Units with entries of the event log, as the ends of runs, have a connection of their own. Their
transactions hold the lock of the log over the commit, so they wait for those of all other nodes: no
other caller may wait behind them. The next batch of a connection collects while a call runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from runlane_server.core.errors import StoreUnavailable
from runlane_server.store.base import Listener, WriteObserver
from runlane_server.store.postgres.committer import Committer, give_up
from runlane_server.store.postgres.connection import Connector
from runlane_server.store.postgres.log import PostgresLog
from runlane_server.store.postgres.notifier import Notifier
from runlane_server.store.postgres.rows import Unit
from runlane_server.store.postgres.write_lines import WriteLine, WriteLines

MAX_BATCH_BYTES = 8 << 20
"""The most bytes in one transaction besides the output of agents, unless one unit has more."""


OTHERS = 2
"""Connections for the other units. With a second one, a caller need not wait for the end of a
flush before its own begins; the database flushes the commits of several connections at once."""


class PostgresWriter:
    """Writes units, in the order that `WriteLines` gives them."""

    def __init__(
        self,
        connector: Connector,
        log_follower: PostgresLog,
        notifier: Notifier,
        listener: Callable[[], Listener | None],
        write_observer: Callable[[], WriteObserver | None],
    ) -> None:
        self._lines: WriteLines[Unit] = WriteLines(OTHERS, MAX_BATCH_BYTES)
        self._wake = {line: asyncio.Event() for line in self._lines.every}
        self._settled = asyncio.Event()
        self._closing = False
        self._committers = {
            line: Committer(connector, log_follower, notifier, listener, write_observer)
            for line in self._lines.every
        }
        self._tasks = [
            asyncio.create_task(self._run(line), name=f"postgres-writer-{line.name}")
            for line in self._lines.every
        ]

    async def write(self, unit: Unit) -> None:
        """Commits a unit, in one batch with other pending ones. Raises the reason of a refusal.

        Cancelling ends the wait only.
        """
        if self._closing:
            raise StoreUnavailable("the store is closed; nothing was written")
        self._wake[self._lines.add(unit)].set()
        # The outcome is a value, as asyncio logs an exception that nobody retrieves.
        result = await unit.future
        if result is not None:
            raise result

    async def close(self) -> None:
        """Commits pending units and stops. It refuses later writes."""
        self._closing = True
        for wake in self._wake.values():
            wake.set()
        await asyncio.wait(self._tasks)

    async def _run(self, line: WriteLine[Unit]) -> None:
        batch: Sequence[Unit] = ()
        committer, wake = self._committers[line], self._wake[line]
        try:
            while line.queue or not self._closing:
                await wake.wait()
                wake.clear()
                while line.queue:
                    batch = line.queue.take()
                    await self._wait_for_older(line, batch)
                    await committer.settle(batch)
                    line.forget(batch)
                    self._settled.set()
        finally:
            # Callers still wait here only if the event loop is shutting down.
            give_up((*batch, *line.queue))
            committer.close()

    async def _wait_for_older(self, line: WriteLine[Unit], batch: Sequence[Unit]) -> None:
        """Waits until the other line has written what comes before a batch."""
        while self._lines.must_wait(line, batch):
            self._settled.clear()
            await self._settled.wait()
