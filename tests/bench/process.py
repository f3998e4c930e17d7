"""Processes of a benchmark, each pinned to a core."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from support.server import ListeningProcess

START_SECONDS = 60.0
"""Seconds that a server has until it listens; some recover 100,000 runs first."""

_PINNED = (
    "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); "
    "os.execvp(sys.argv[2], sys.argv[2:])"
)


def cores() -> tuple[int, int]:
    """The core of the servers and that of the load; the same one where there is only one."""
    available = sorted(os.sched_getaffinity(0))
    return available[0], available[-1]


def environment() -> dict[str, str]:
    """The environment of a process, which imports the benchmark."""
    return {**os.environ, "NO_COLOR": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def pinned(core: int | None, command: Sequence[str]) -> Sequence[str]:
    """The command, run on that core only from its first instruction; on any core without one."""
    if core is None:
        return command
    return [sys.executable, "-S", "-c", _PINNED, str(core), *command]


async def start(core: int | None, command: Sequence[str], folder: Path, log: str) -> Process:
    """Starts a process with pipes to stdin and stdout; stderr goes to a file in the folder."""
    with (folder / log).open("ab") as stderr:
        return await asyncio.create_subprocess_exec(
            *pinned(core, command),
            stdin=PIPE,
            stdout=PIPE,
            stderr=stderr,
            cwd=folder,
            env=environment(),
            limit=1 << 22,
        )


async def end(process: Process) -> None:
    """Kills a process and waits for its end; its remaining output is lost."""
    if process.returncode is None:
        # Not process.kill(): it may reap the process, which asyncio then complains about.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    await process.wait()


class Server(ListeningProcess):
    """A server under measurement, on one core or, without a number, on any. `env` adds variables to
    its environment."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        core: int | None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(pinned(core, command), folder, env={**environment(), **(env or {})})
        self.begun = 0.0

    async def __aenter__(self) -> Self:
        """Starts the server, and returns once it listens."""
        self.begun = time.perf_counter()
        self.launch()
        try:
            await asyncio.to_thread(self.wait_until_listening, START_SECONDS)
        except BaseException:
            self.kill_now()
            raise
        return self

    async def restart(self) -> None:
        """Kills the server, and starts it again on its store."""
        await self.kill()
        await self.__aenter__()

    async def __aexit__(self, *error: object) -> None:
        """Ends the server."""
        await self.kill()
