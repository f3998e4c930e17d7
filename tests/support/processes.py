"""Facts about a process that the kernel knows: its end, memory, CPU time and descriptors."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from support.staging import SECONDS

_TICKS = os.sysconf("SC_CLK_TCK")


def is_running(pid: int) -> bool:
    """Whether the process runs. A zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in {"Z", "X"}


async def wait_for_exit(pid: int) -> None:
    """Returns when the process has ended. It need not be a child, and is not reaped."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(pidfd, ended.set)
    try:
        async with asyncio.timeout(SECONDS):
            await ended.wait()
    finally:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)


def cpu_seconds(pid: int) -> float:
    """The CPU time of a process and its children, in user mode and in the kernel.

    Children that have ended are counted if the process has waited for them.
    """
    # The name of the program, in brackets, may contain anything; the numbers follow it.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = sum(map(int, fields[11:15])) / _TICKS
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = (child for task in tasks for child in (task / "children").read_text().split())
    return own + sum(cpu_seconds(int(child)) for child in children)


def resident_bytes(pid: int) -> int:
    """The resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"process {pid} has no memory")


def open_descriptors(pid: int) -> int:
    """The number of file descriptors that a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
