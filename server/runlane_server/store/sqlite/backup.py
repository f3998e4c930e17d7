"""A copy of a database file while a server uses it."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from runlane_server.core.errors import StartError
from runlane_server.store.sqlite.apply import SQL
from runlane_server.store.sqlite.check import Counts, counts
from runlane_server.store.sqlite.lock import FileLock
from runlane_server.store.sqlite.snapshot import snapshot_of

STEP_PAGES = 1_024
"""How many pages are copied at a time: 4 MiB."""


@dataclass(frozen=True, slots=True)
class Backup:
    """What was written."""

    size: int
    counts: Counts


def back_up(source: Path, target: Path, *, force: bool = False) -> Backup:
    """Writes a consistent, verified copy of `source` to `target`, which is there whole or not.

    The copy has no store id: each store that is made of it gets one of its own at its first start.
    A cursor from before the restore is thereby refused, as what follows differs from store to
    store. Raises StartError; `target` is as it was then.
    """
    target = Path(os.path.realpath(target))  # a link stays one
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
        raise StartError(f"backup {target}: is a directory")
    if not target.exists():
        return
    if source.exists() and target.samefile(source):
        raise StartError(f"backup {target}: is the store itself")
    if not force:
        raise StartError(f"backup {target}: is there already; --force replaces it")
    if target.with_name(target.name + ".lock").exists():
        # It was a store; raises if a server uses it now.
        FileLock(target).release()


@contextmanager
def _exclusive(partial: Path) -> Iterator[int]:
    """The file to write to, empty and nobody else's; removed if that fails.

    What a backup that was killed has left is written over; one that is under way is not.
    """
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StartError(f"backup {partial}: another backup is writing it") from error
        if not partial.exists() or partial.stat().st_ino != os.fstat(descriptor).st_ino:
            raise StartError(f"backup {partial}: another backup has just finished it")
        os.ftruncate(descriptor, 0)
        try:
            yield descriptor
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    finally:
        os.close(descriptor)


def _copy(source: sqlite3.Connection, partial: Path) -> Counts:
    """Copies what `source` sees, in steps, and verifies the copy."""
    # The read transaction that the source is in keeps all steps at one state: without it every
    # commit of the server would make the copy begin again.
    source.execute(SQL["store_id"]).fetchone()
    with closing(sqlite3.connect(partial, isolation_level=None)) as copy:
        # The file counts from its rename on, and is synced before that.
        copy.execute("PRAGMA synchronous = OFF")
        # Between two steps there is time for a Ctrl-C.
        source.backup(copy, pages=STEP_PAGES, progress=lambda *_: None, sleep=0)
        # One file; a server turns the write-ahead log on again.
        copy.execute("PRAGMA journal_mode = DELETE")
        copy.execute(SQL["unname_store"])
        (verdict,) = copy.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise StartError(f"backup {partial}: the copy is damaged: {' '.join(verdict.split())}")
        return counts(copy)


def _sync_folder(folder: Path) -> None:
    """Makes a rename last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system can
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
