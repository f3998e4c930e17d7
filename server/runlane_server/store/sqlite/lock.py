"""The lock that keeps a second server off a database file."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from runlane_server.core.errors import StartError


class FileLock:
    """An exclusive lock on `<database>.lock`, which ends with the process at the latest.

    It is not on the database itself: closing any descriptor of that file would drop the locks that
    SQLite holds on it in this process. The lock file is never removed, as a server that waits at
    its door would then hold a lock on a file that nobody else sees.
    """

    def __init__(self, database: Path) -> None:
        """Takes the lock; raises StartError where that cannot be."""
        # Next to the file itself, whichever link it was named by.
        file = Path(os.path.realpath(database))
        self._path = file.with_name(file.name + ".lock")
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StartError(f"store {database}: {self._path}: {error.strerror}") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip()
            self.release()
            raise StartError(
                f"store {database}: another server (process {holder or 'unknown'}) uses it"
            ) from error
        except OSError as error:
            self.release()
            raise StartError(f"store {database}: cannot be locked: {error.strerror}") from error
        # For the operator who wonders who holds it.
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Gives the lock up."""
        os.close(self._descriptor)
