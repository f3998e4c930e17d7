"""The lock against a second server on the same database file."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from runlane_server.core.errors import StartError, start_error


def open_private(path: Path) -> int:
    """Opens a file, created if it is missing, that only its owner can read, under any umask.

    Returns the descriptor. Raises OSError.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with suppress(OSError):  # it belongs to another user, or the file system has no modes
        os.fchmod(descriptor, 0o600)
    return descriptor


class FileLock:
    """An exclusive lock on the file `<database>.lock`; the end of the process releases it.

    The lock is not on the database itself, because closing any descriptor of that file would drop
    the locks that SQLite holds on it in this process. The lock file is never removed: a server that
    has just opened it would otherwise lock a file that no other server sees.
    """

    def __init__(self, database: Path) -> None:
        """Takes the lock. Raises StartError."""
        # Next to the file itself, also when `database` is a link to it.
        file = Path(os.path.realpath(database))
        self._path = file.with_name(file.name + ".lock")
        try:
            self._descriptor = open_private(self._path)
        except OSError as error:
            message = f"store {database}: {self._path}: {error.strerror}"
            raise start_error(message, error) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip()
            self.release()
            raise StartError(
                f"store {database}: in use by another server (process {holder or 'unknown'})"
            ) from error
        except OSError as error:
            self.release()
            raise StartError(f"store {database}: the lock failed: {error.strerror}") from error
        # For the operator, and for the error above.
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Releases the lock."""
        os.close(self._descriptor)
