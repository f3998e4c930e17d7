"""Files in directories that programs can write to.

A program may put a link, a pipe or a huge file where the server is to read or write. So no link is
followed, only regular files of a limited size are read, no file is ever opened for writing that was
there before, and nothing waits for another process. Use it in a thread, as disks may be slow.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


def read_file(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises OSError."""
    with _directory(path.parent) as parent:
        file = os.open(path.name, _READ, dir_fd=parent)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        with open(file, "rb", closefd=False) as opened:
            content = opened.read(limit + 1)
    finally:
        os.close(file)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"has more than {limit} bytes", str(path))
    return content


def replace_file(path: Path, content: bytes) -> None:
    """Creates or replaces a file at once, as a whole. Raises OSError."""
    new = f".{secrets.token_hex(8)}.new"
    with _directory(path.parent) as parent:
        try:
            _create(new, content, parent)
            os.rename(new, path.name, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(new, dir_fd=parent)
            raise


class NewFiles:
    """A new directory in `parent`, for files that a program is to read.

    Made before the program starts, it stays the one that is written to, also if the
    program puts something in its place.
    """

    def __init__(self, parent: Path) -> None:
        """Raises OSError."""
        self.path = Path(tempfile.mkdtemp(prefix="files-", dir=parent))
        self._directory = os.open(self.path, _DIRECTORY)
        # Not closed before a thread that writes has let go of it: the number could be another's.
        weakref.finalize(self, os.close, self._directory)

    def write(self, name: str, content: bytes) -> Path:
        """Creates a file. Raises OSError, also if the name is taken."""
        _create(name, content, self._directory)
        return self.path / name


def _create(name: str, content: bytes, directory: int) -> None:
    file = os.open(name, _CREATE, 0o600, dir_fd=directory)
    with open(file, "wb") as opened:  # noqa: PTH123 - a descriptor
        opened.write(content)


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[int]:
    """Opens a directory; neither it nor its parent may be a link."""
    parent = os.open(path.parent, _DIRECTORY)
    try:
        directory = os.open(path.name, _DIRECTORY, dir_fd=parent)
    finally:
        os.close(parent)
    try:
        yield directory
    finally:
        os.close(directory)
