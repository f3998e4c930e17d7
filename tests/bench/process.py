"""Processes of a benchmark: pinned to a core, measured from outside, ended for good."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from pathlib import Path
from typing import Self

SECONDS = 60.0
"""How long a process has to say that it serves."""

_PINNED = (
    "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); "
    "os.execvp(sys.argv[2], sys.argv[2:])"
)
_TICKS = os.sysconf("SC_CLK_TCK")


def cores() -> tuple[int, int]:
    """The core of the servers and that of the load; the same one where there is only one."""
    available = sorted(os.sched_getaffinity(0))
    return available[0], available[-1]


async def start(core: int | None, argv: Sequence[str], folder: Path, log: str) -> Process:
    """A process that runs on that core only from its first instruction; stderr goes to a file."""
    pinned = () if core is None else (sys.executable, "-S", "-c", _PINNED, str(core))
    with (folder / log).open("ab") as stderr:
        return await asyncio.create_subprocess_exec(
            *pinned,
            *argv,
            stdin=PIPE,
            stdout=PIPE,
            stderr=stderr,
            cwd=folder,
            env={**os.environ, "NO_COLOR": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
            limit=1 << 22,
        )


async def end(process: Process) -> None:
    """Ends it at once; what it wrote is thrown away."""
    if process.returncode is None:
        # Not process.kill(): it may reap the process, which asyncio then complains about.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    await process.wait()


def cpu_seconds(pid: int) -> float:
    """The time that a process and its children have had on cores, in user mode and in the kernel;
    children that have ended are counted if it has waited for them."""
    # The name of the program, in brackets, may hold anything; what is counted follows it.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = sum(map(int, fields[11:15])) / _TICKS
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = (child for task in tasks for child in (task / "children").read_text().split())
    return own + sum(cpu_seconds(int(child)) for child in children)


def resident_bytes(pid: int) -> int:
    """The memory that a process has in RAM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"process {pid} has no memory")


class Server:
    """A server process under measurement, on one core or, without a number, on any."""

    def __init__(self, argv: Sequence[str], folder: Path, core: int | None) -> None:
        self._argv = argv
        self._folder = folder
        self._core = core
        self._process: Process | None = None
        self.address = ""
        self.begun = 0.0

    async def __aenter__(self) -> Self:
        """Starts it, and returns once it says that it serves."""
        self.begun = time.perf_counter()
        self._process = await start(self._core, self._argv, self._folder, "server.log")
        try:
            assert self._process.stdout is not None
            async with asyncio.timeout(SECONDS):
                line = (await self._process.stdout.readline()).decode()
            if " listening on " not in line:
                log = (self._folder / "server.log").read_text()
                raise RuntimeError(f"{self._argv} did not start: {line!r}\n{log[-2000:]}")
        except BaseException:
            await end(self._process)
            raise
        self.address = line.split()[-1]
        return self

    async def __aexit__(self, *error: object) -> None:
        """Ends it."""
        assert self._process is not None
        await end(self._process)

    @property
    def pid(self) -> int:
        """The id of the process."""
        assert self._process is not None
        return self._process.pid
