"""The control groups of runs, where the system lets the server create some (see `cgroup`).

    OWN GROUP/runlane-command-xxxxxxxx/     of a server, which holds a lock on it
        run-n/                              of a run: its program and all that this started

The launcher of a run stays outside and ends the group. The server does so too, as the program may
have killed the launcher. If a server and its launchers were killed, the next server ends their
groups. Without groups, the launcher ends the process tree.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from pathlib import Path

import structlog

from runlane_server.agents.command.cgroup import kill_cgroup, remove_cgroup
from runlane_server.agents.command.run_dirs import find_left, make_locked

KILL_TIMEOUT = 1.0
"""Seconds to wait for the processes of a group after SIGKILL; the kernel may keep them longer."""

_INTERVAL, _SLOW_INTERVAL = 0.005, 0.1
"""Seconds between two attempts to remove a group: after SIGKILL, and before."""

log = structlog.get_logger()


def own_cgroup() -> Path | None:
    """The group of this process if it may create others below it; None if not, or if the kernel
    cannot end a group (before Linux 5.14)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        found = _find(lines, Path("/proc/self/mountinfo").read_text().splitlines())
    except OSError:
        return None
    if found is None or not os.access(found, os.W_OK | os.X_OK):
        return None
    # Moving a process down requires this too.
    return found if os.access(found / "cgroup.procs", os.W_OK) else None


def _find(groups: list[str], mounts: list[str]) -> Path | None:
    own = next((line[3:] for line in groups if line.startswith("0::/")), None)
    if own is None or ".." in own:  # outside of this namespace
        return None
    for line in mounts:
        place, _, kind = line.partition(" - ")
        root, at = place.split()[3:5]
        if kind.startswith("cgroup2 ") and Path(own).is_relative_to(root):
            return Path(at, Path(own).relative_to(root))
    return None


def can_be_ended(group: Path) -> bool:
    """Whether the kernel can end all processes of a group at once."""
    return (group / "cgroup.kill").exists()


class RunCgroups:
    """The groups of the runs of one server."""

    def __init__(self) -> None:
        self._own: Path | None = None
        self._lock = -1
        self._numbers = itertools.count(1)
        self._clearing: set[asyncio.Task[None]] = set()

    async def start(self, grace: float) -> None:
        """Creates the group of this server if it can, and ends what killed servers left behind.

        Their launchers have `grace` seconds to do that. This continues in the background.
        """
        parent = None if self._own is not None else own_cgroup()
        if parent is None:
            return
        for path, lock in await asyncio.to_thread(find_left, parent):
            self._clearing.add(asyncio.create_task(self._clear(path, lock, grace)))
        try:
            own, lock = make_locked(parent)
        except OSError:
            return
        if can_be_ended(own):
            self._own, self._lock = own, lock
        else:
            remove_cgroup(str(own))
            os.close(lock)

    async def _clear(self, path: Path, lock: int, grace: float) -> None:
        until = time.monotonic() + grace + KILL_TIMEOUT
        try:
            while not (is_gone := remove_cgroup(str(path))) and time.monotonic() < until:
                await asyncio.sleep(_SLOW_INTERVAL)
            if not is_gone:
                log.warning("ending processes that a killed server left", cgroup=str(path))
                await self.end(str(path))
        finally:
            os.close(lock)

    def create(self) -> str:
        """Creates a group for a run; empty if that is not possible."""
        if self._own is None:
            return ""
        path = self._own / f"run-{next(self._numbers)}"
        try:
            path.mkdir(mode=0o700)
        except OSError as exc:
            log.warning("no cgroup for a run", error=exc.strerror)
            return ""
        return str(path)

    async def end(self, group: str) -> None:
        """Ends what is left in the group of a run, and removes it."""
        until = time.monotonic() + KILL_TIMEOUT
        while group and not self.end_soon(group):
            if time.monotonic() > until:
                log.warning("processes of a run remain after SIGKILL", cgroup=group)
                return
            await asyncio.sleep(_INTERVAL)

    @staticmethod
    def end_soon(group: str) -> bool:
        """Ends a group without waiting; returns whether it is gone."""
        if not group or remove_cgroup(group):
            return True
        kill_cgroup(group)
        return False

    async def close(self) -> None:
        """Ends and removes the group of this server. No run uses it any more."""
        for task in self._clearing:
            task.cancel()
        await asyncio.gather(*self._clearing, return_exceptions=True)
        if self._own is not None:
            own, self._own = self._own, None
            await self.end(str(own))
            os.close(self._lock)
