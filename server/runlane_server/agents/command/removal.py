"""Removes directory trees of any depth, with read-only parts, without following links.

A program may leave a path of 30,000 levels, which no path name can reach. So nothing is descended
into: a directory is moved up into the root of its tree before its own contents are removed. This
takes constant stack, memory and file descriptors.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

MAX_THREADS = 4
"""Number of trees that are removed at the same time."""

log = structlog.get_logger()


class Remover:
    """Removes trees in threads of its own. They do not hold the exit of the process."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Path, Future[None]] | None] = queue.SimpleQueue()
        self._threads = 0

    def remove(self, path: Path) -> asyncio.Future[None]:
        """Removes a tree; the future is done when it is removed. Raises RuntimeError if there can
        be no thread."""
        done: Future[None] = Future()
        if self._threads < MAX_THREADS:
            threading.Thread(target=self._work, daemon=True).start()
            self._threads += 1
        self._queue.put((path, done))
        return asyncio.wrap_future(done)

    def close(self) -> None:
        """Ends the threads once they have removed everything."""
        for _ in range(self._threads):
            self._queue.put(None)
        self._threads = 0

    def _work(self) -> None:
        while job := self._queue.get():
            path, done = job
            try:
                remove_tree(path)
            finally:
                done.set_result(None)


def remove_tree(path: Path) -> None:
    """Removes a directory with its contents. Failures are logged, not raised.

    A directory on another file system stays: something is mounted there.
    """
    try:
        with _opened(str(path)) as root:
            _empty(root)
        path.rmdir()
    except FileNotFoundError:
        pass
    except OSError as exc:
        log.warning("run directory not removed", path=str(path), error=str(exc))


def _empty(root: int) -> None:
    """Removes what can be removed of a directory's contents."""
    device = os.fstat(root).st_dev
    names = (f".removed-{number}" for number in itertools.count())
    failed: set[str] = set()
    while directories := _remove_files(root) - failed:
        for name in directories:
            failed.add(name)
            with suppress(OSError):
                with _opened(name, root) as directory:
                    if os.fstat(directory).st_dev == device:
                        for child in _remove_files(directory):
                            _move(child, directory, root, names)
                os.rmdir(name, dir_fd=root)
                failed.discard(name)


def _remove_files(directory: int) -> set[str]:
    """Removes all files of a directory; returns the names of the directories in it."""
    directories: set[str] = set()
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                directories.add(entry.name)
            else:
                with suppress(OSError):
                    os.unlink(entry.name, dir_fd=directory)
    return directories


def _move(name: str, source: int, target: int, names: Iterator[str]) -> None:
    """Moves a directory to a name that is free, if it can be moved."""
    with suppress(OSError):
        with _opened(name, source):  # it must be writable to be moved
            pass
        for new in names:
            try:
                os.rename(name, new, src_dir_fd=source, dst_dir_fd=target)
            except OSError as exc:
                if exc.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
                    raise
            else:
                return


@contextmanager
def _opened(path: str, parent: int | None = None) -> Iterator[int]:
    """Opens a directory, which becomes accessible if it is not. Raises OSError, also for a link."""
    place = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY, dir_fd=parent)
    try:
        if os.fstat(place).st_mode & 0o700 != 0o700:
            os.chmod(f"/proc/self/fd/{place}", 0o700)  # noqa: PTH101 - cannot follow a link
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=place)
    finally:
        os.close(place)
    try:
        yield directory
    finally:
        os.close(directory)
