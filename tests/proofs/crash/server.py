"""The server of a round: it is ended in every way in which a server can end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE

from proofs.crash.disk import Disk
from support.server import ServerProcess
from support.staging import SECONDS

LIMITS = (
    *("--max-active-runs", "3", "--max-waiting-runs", "4"),
    *("--cancel-grace", "200ms", "--drain-timeout", "300ms", "--progress-interval", "100ms"),
    *("--log-level", "info", "--log-format", "json"),
)
"""Limits so low that slots and queues are full most of the time."""

STORE = "sqlite:///crash.db"

_SERVING = b'"event": "serving"'


class CrashServer(ServerProcess):
    """A server with a SQLite file in its folder, on a simulated disk if one is given."""

    def __init__(
        self, folder: Path, agent: str, disk: Disk | None = None, *, limits: Sequence[str] = LIMITS
    ) -> None:
        env = {} if disk is None else disk.env
        super().__init__(folder, "--store", STORE, "--agent", agent, *limits, env=env)
        self._disk = disk

    async def kill(self) -> None:
        """Ends the server as a crash would, or as a power cut would if its disk is simulated."""
        await super().kill()
        self._cut_power()

    async def fail(self, **faults: int) -> int:
        """Ends the server by faults of its disk, and repairs the disk; returns the exit code."""
        assert self._disk is not None
        self._disk.set(**faults)
        code = await self.wait()
        self._disk.set()
        return code

    def _cut_power(self) -> None:
        if self._disk is not None:
            self._disk.cut_power(self.folder)

    async def drain(self) -> int:
        """Ends the server as an operator would; returns the exit code."""
        return await self.stop(signal.SIGTERM)

    async def start_and_kill(self, lines: int) -> None:
        """Starts the server, and kills it once it has logged `lines` lines, or serves.

        A small number kills it before or during its recovery.
        """
        self.launch(stderr=PIPE)
        try:
            async with asyncio.timeout(SECONDS):
                await asyncio.to_thread(self._read_log, lines)
        finally:
            self.kill_now()
        self._cut_power()

    def _read_log(self, lines: int) -> None:
        assert self.process.stderr is not None
        for _ in range(lines):
            if _SERVING in self.process.stderr.readline():
                return
