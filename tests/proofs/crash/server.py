"""The server of a round: ended in all the ways a server may end."""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

from proofs.crash.disk import Disk
from support.process import SECONDS, ServerProcess

LIMITS = (
    *("--max-active-runs", "3", "--max-waiting-runs", "4"),
    *("--cancel-grace", "200ms", "--drain-timeout", "300ms", "--progress-interval", "100ms"),
    *("--log-level", "info", "--log-format", "json"),
)
"""So small that slots and queues are full most of the time."""

STORE = "sqlite:///crash.db"


class Victim(ServerProcess):
    """A server with a SQLite file in a folder of its own, on a disk of ours where there is one."""

    def __init__(self, folder: Path, agent: str, disk: Disk | None = None) -> None:
        env = {} if disk is None else disk.env
        super().__init__(folder, "--store", STORE, "--agent", agent, *LIMITS, env=env)
        self._disk = disk

    async def kill(self) -> None:
        """Ends it as a crash would, or on a disk of ours as a power cut would."""
        await super().kill()
        self._cut()

    async def fail(self, **faults: int) -> int:
        """Ends it by faults of its disk, which are mended then; returns the exit code."""
        assert self._disk is not None
        self._disk.set(**faults)
        code = await self.ended()
        self._disk.set()
        return code

    def _cut(self) -> None:
        if self._disk is not None:
            self._disk.cut_power(self.folder)

    async def drain(self) -> int:
        """Ends it as an operator would; returns the exit code."""
        return await self.stop(signal.SIGTERM)

    async def start_in_vain(self, lines: int) -> None:
        """Starts it, and kills it once it has logged so many lines: before or in its recovery.

        One that has nothing to recover may have less to say: it is killed as it begins to serve.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "runlane_server", "--listen", self.address),
            *self._flags,
            stdout=DEVNULL,
            stderr=PIPE,
            cwd=self.folder,
            env=self._env,
        )
        assert process.stderr is not None
        try:
            async with asyncio.timeout(SECONDS):
                for _ in range(lines):
                    if b'"event": "serving"' in await process.stderr.readline():
                        break
        finally:
            if process.returncode is None:
                process.kill()
            # What it has said since is read too: a full pipe is no reason for it to stop.
            await process.communicate()
        self._cut()
