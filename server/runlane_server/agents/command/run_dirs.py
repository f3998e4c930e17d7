"""Private directories for programs: one for each run, in one that the server has for itself.

    PARENT/runlane-command-xxxxxxxx/    of one server, which holds a lock on it
        run-xxxxxxxx/                   of one run

All have mode 0700. The kernel drops the lock however a server ends, so what nobody has locked is
left over from a server that was killed, and the next one that starts removes it. systemd-tmpfiles,
too, keeps away from what is locked. PARENT has to be on a file system with locks on directories
(flock), as local ones are.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import structlog

log = structlog.get_logger()

PREFIX = "runlane-command-"
"""How the directory of a server is named, so that the next one finds it."""

REMOVAL_SECONDS = 1.0
"""How long the end of a run waits at the most for the removal of what it left."""


class RunDirs:
    """The directories of the runs of one server below a parent. To be used within one event loop.

    Without a parent they are in the system's directory for temporary files. A parent that is not
    there is made; raises OSError where that cannot be.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self._parent = (parent or Path(tempfile.gettempdir())).absolute()
        self._parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._own: Path | None = None
        self._lock = -1
        self._removals: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Removes what killed servers left, and takes a directory. Raises OSError."""
        await asyncio.to_thread(_sweep, self._parent)
        self._take()

    def make(self) -> Path:
        """A new empty directory, for a run. Raises OSError."""
        self._take()
        try:
            return _new(self._own, "run-")
        except FileNotFoundError:  # somebody cleaned up
            self._give_up()
            self._take()
            return _new(self._own, "run-")

    async def remove(self, path: Path) -> None:
        """Removes the directory of a run, with all that is in it; what takes long goes on in the
        background."""
        if _removed_empty(path):
            return
        removal = asyncio.create_task(asyncio.to_thread(_remove, path))
        self._removals.add(removal)
        removal.add_done_callback(self._removals.discard)
        await asyncio.wait({removal}, timeout=REMOVAL_SECONDS)

    async def close(self) -> None:
        """Removes the directory of this server. No run has one any more."""
        if self._removals:
            await asyncio.wait(self._removals)
        if self._own is not None:
            await asyncio.to_thread(_remove, self._own)
            self._give_up()

    def _take(self) -> None:
        while self._own is None:
            path = _new(self._parent, PREFIX)
            # Another server that starts may take it for a leftover, until it is locked.
            if (lock := _locked(path)) is not None:
                self._own, self._lock = path, lock

    def _give_up(self) -> None:
        os.close(self._lock)
        self._own = None


def _new(parent: Path | None, prefix: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))


def _locked(path: Path) -> int | None:
    """Locks a directory; None if another process holds it, or removed it meanwhile."""
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


def _sweep(parent: Path) -> None:
    """Removes the directories that no living server holds. Others' are none of our business."""
    for path in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if path.lstat().st_uid == os.geteuid() and (lock := _locked(path)) is not None:
                try:
                    _remove(path)
                finally:
                    os.close(lock)


def _removed_empty(path: Path) -> bool:
    """Removes a directory that nothing was left in, which is quick; whether it did."""
    try:
        path.rmdir()
    except OSError:
        return False
    return True


def _remove(path: Path) -> None:
    """Removes a directory, also where its owner made parts of it read-only, as some caches do."""
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        with suppress(OSError):
            _make_writable(path)
        shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        log.warning("the directory of a program could not be removed", path=str(path))


def _make_writable(path: Path) -> None:
    path.chmod(0o700)
    for folder, names, _ in os.walk(path):
        for name in names:
            if not (found := Path(folder, name)).is_symlink():
                found.chmod(0o700)
