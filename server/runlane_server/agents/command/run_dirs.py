"""The private directories of runs, inside one directory per server.

    PARENT/runlane-command-xxxxxxxx/    of a server, which holds a lock on it
        run-xxxxxxxx/                   of a run

All have mode 0700. The kernel releases the lock however a server ends, so an unlocked directory was
left by a server that was killed, and the next server that starts removes it. systemd-tmpfiles also
leaves locked directories alone. PARENT must be on a file system with locks on directories (flock),
as local file systems are.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from runlane_server.agents.command.removal import Remover

PREFIX = "runlane-command-"
"""Prefix of the name of a server's directory, by which the next server finds it."""

REMOVAL_TIMEOUT = 1.0
"""Seconds that the end of a run, and the start of the agent, wait for a removal."""

CLOSE_TIMEOUT = 5.0
"""Seconds that the shutdown waits for removals. The next start removes what is left."""


class RunDirs:
    """The directories of the runs of one server. Bound to one event loop.

    `parent` is by default the system's directory for temporary files. It is created if it does not
    exist; raises OSError.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self._parent = (parent or Path(tempfile.gettempdir())).absolute()
        self._parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._own: Path | None = None
        self._lock = -1
        self._remover = Remover()
        self._removals: set[asyncio.Future[None]] = set()

    async def start(self) -> None:
        """Removes the directories of killed servers, and creates one. Raises OSError.

        Removals that take longer than `REMOVAL_TIMEOUT` continue in the background.
        """
        self._create_own()
        left = await asyncio.to_thread(find_left, self._parent)
        await self._wait([self._remove(path, lock) for path, lock in left], REMOVAL_TIMEOUT)

    def create(self) -> Path:
        """Creates an empty directory for a run. Raises OSError."""
        self._create_own()
        try:
            return _make_directory(self._own, "run-")
        except FileNotFoundError:  # removed by a clean-up of the system
            self._unlock()
            self._create_own()
            return _make_directory(self._own, "run-")

    async def remove(self, path: Path) -> None:
        """Removes the directory of a run with its contents. A removal that takes longer than
        `REMOVAL_TIMEOUT` continues in the background."""
        if _remove_if_empty(path):
            return
        await self._wait([self._remove(path)], REMOVAL_TIMEOUT)

    async def close(self) -> None:
        """Removes the directory of this server. No run uses it any more."""
        # First those inside: two threads would not remove the whole of one tree.
        await self._wait(list(self._removals), CLOSE_TIMEOUT)
        if self._own is not None:
            own, self._own = self._own, None
            await self._wait([self._remove(own, self._lock)], CLOSE_TIMEOUT)
        self._remover.close()

    def _remove(self, path: Path, lock: int | None = None) -> asyncio.Future[None]:
        """Removes a directory, and then its lock."""
        removal = self._remover.remove(path)
        self._removals.add(removal)
        removal.add_done_callback(self._removals.discard)
        if lock is not None:
            removal.add_done_callback(lambda _: os.close(lock))
        return removal

    @staticmethod
    async def _wait(removals: list[asyncio.Future[None]], timeout: float) -> None:
        if removals:
            await asyncio.wait(removals, timeout=timeout)

    def _create_own(self) -> None:
        if self._own is None:
            self._own, self._lock = make_locked(self._parent)

    def _unlock(self) -> None:
        os.close(self._lock)
        self._own = None


def make_locked(parent: Path) -> tuple[Path, int]:
    """Creates and locks a directory of this server; returns it with its lock. Raises OSError."""
    while True:
        path = _make_directory(parent, PREFIX)
        # Until it is locked, another server that starts may remove it as left over.
        if (lock := _try_lock(path)) is not None:
            return path, lock


def _make_directory(parent: Path | None, prefix: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))


def _try_lock(path: Path) -> int | None:
    """Locks a directory; returns None if another process holds the lock, or removed the directory
    meanwhile."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), path.lstat()):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def find_left(parent: Path) -> list[tuple[Path, int]]:
    """Finds and locks the directories that no running server holds, except those of others."""
    found: list[tuple[Path, int]] = []
    for path in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if path.lstat().st_uid == os.geteuid() and (lock := _try_lock(path)) is not None:
                found.append((path, lock))
    return found


def _remove_if_empty(path: Path) -> bool:
    """Removes a directory if it is empty, which is fast; returns whether it did."""
    try:
        path.rmdir()
    except OSError:
        return False
    return True
