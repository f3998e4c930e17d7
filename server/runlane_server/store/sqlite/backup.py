"""Backup of a database file while a server uses it."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from runlane_server.core.errors import StartError
from runlane_server.store.findings import Counts
from runlane_server.store.sqlite.check import counts
from runlane_server.store.sqlite.lock import FileLock, open_private
from runlane_server.store.sqlite.snapshot import snapshot_of
from runlane_server.store.sqlite.transaction import SQL

STEP_PAGES = 1_024
"""Pages that one step copies: 4 MiB."""


@dataclass(frozen=True, slots=True)
class Backup:
    """The size of a backup in bytes, and its contents."""

    size: int
    counts: Counts


def back_up(source: Path, target: Path, *, force: bool = False) -> Backup:
    """Writes a consistent, verified copy of `source` to `target`, atomically.

    The copy has no store id: a store that is restored from it gets a new one at its first start.
    It therefore refuses cursors from before the restore, as its events from then on differ. Raises
    StartError; `target` is then unchanged.
    """
    target = Path(os.path.realpath(target))  # keeps a link a link
    _check_target(source, target, force=force)
    partial = target.with_name(target.name + ".partial")
    try:
        with snapshot_of(source) as db, _exclusive(partial) as descriptor:
            found = _copy(db, partial)
            os.fsync(descriptor)
            size = partial.stat().st_size
            partial.replace(target)
            _sync_folder(target.parent)
    except sqlite3.Error as error:
        raise StartError(f"backup {target}: {error}") from error
    except OSError as error:
        raise StartError(f"backup {target}: {error.strerror}") from error
    return Backup(size, found)


def _check_target(source: Path, target: Path, *, force: bool) -> None:
    if target.is_dir():
        raise StartError(f"backup {target}: the path is a directory")
    if not target.exists():
        return
    if source.exists() and target.samefile(source):
        raise StartError(f"backup {target}: the path is the store itself")
    if not force:
        raise StartError(f"backup {target}: the file exists; --force replaces it")
    if target.with_name(target.name + ".lock").exists():
        # It was a store: raises if a server uses it now.
        FileLock(target).release()


@contextmanager
def _exclusive(partial: Path) -> Iterator[int]:
    """The empty, locked file to write to. It is removed if the backup fails.

    It overwrites the file of a backup that was killed, but not that of a running one.
    """
    descriptor = open_private(partial)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StartError(f"backup {partial}: another backup is writing this file") from error
        if not partial.exists() or partial.stat().st_ino != os.fstat(descriptor).st_ino:
            raise StartError(f"backup {partial}: another backup has just finished this file")
        os.ftruncate(descriptor, 0)
        try:
            yield descriptor
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    finally:
        os.close(descriptor)


def _copy(source: sqlite3.Connection, partial: Path) -> Counts:
    """Copies the snapshot of `source` in steps, and verifies the copy."""
    # The read transaction of the source keeps all steps at one state: without it, every commit of
    # the server would restart the copy.
    source.execute(SQL["store_id"]).fetchone()
    with closing(sqlite3.connect(partial, isolation_level=None)) as copy:
        # The file is synced before the rename that makes it valid.
        copy.execute("PRAGMA synchronous = OFF")
        # A Ctrl-C takes effect between two steps.
        source.backup(copy, pages=STEP_PAGES, progress=lambda *_: None, sleep=0)
        # One file without a write-ahead log; a server turns the log on again.
        copy.execute("PRAGMA journal_mode = DELETE")
        copy.execute(SQL["unname_store"])
        (verdict,) = copy.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise StartError(f"backup {partial}: the copy is damaged: {' '.join(verdict.split())}")
        return counts(copy)


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system supports it
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
