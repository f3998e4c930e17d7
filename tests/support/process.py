"""A real server process, started and ended as an operator would."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

SECONDS = 30.0
"""How long a test waits for what has to happen, before it says that it did not."""


class ServerProcess:
    """`runlane-server` in a folder of its own; it keeps its address over a restart."""

    def __init__(self, folder: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.address = "127.0.0.1:0"
        self._flags = flags
        self._env = {**os.environ, "NO_COLOR": "1", **(env or {})}
        self._prefix: tuple[str, ...] = ()
        self._process: Process | None = None

    @property
    def pid(self) -> int:
        """The id of the process."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return (self.folder / "server.log").read_text()

    async def start(self, *more_flags: str) -> None:
        """Starts it, and returns once it serves."""
        with (self.folder / "server.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(*self._prefix, sys.executable),
                *("-m", "runlane_server", "--listen", self.address),
                *self._flags,
                *more_flags,
                stdout=PIPE,
                stderr=log,
                cwd=self.folder,
                env=self._env,
            )
        assert self._process.stdout is not None
        async with asyncio.timeout(SECONDS):
            line = (await self._process.stdout.readline()).decode()
        if not line.startswith("runlane-server listening on "):
            await self._process.wait()
            raise AssertionError(f"the server did not start: {line!r}\n{self.log}")
        self.address = line.split()[-1]

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    async def ended(self) -> int:
        """Waits for its end; returns the exit code."""
        assert self._process is not None
        async with asyncio.timeout(SECONDS):
            return await self._process.wait()

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ends it with a signal, if it runs; returns the exit code."""
        if self._process is None:
            return 0
        if self._process.returncode is None:
            self.send(number)
        return await self.ended()

    async def kill(self) -> None:
        """Ends it as a crash would."""
        await self.stop(signal.SIGKILL)


@asynccontextmanager
async def serving(
    folder: Path, *flags: str, env: dict[str, str] | None = None
) -> AsyncIterator[ServerProcess]:
    """A server that runs; ended for good whatever happens."""
    server = ServerProcess(folder, *flags, env=env)
    try:
        await server.start()
        yield server
    finally:
        await server.kill()
