"""Opens a SQLite file: locks it, checks that it is ours, and migrates it."""

from __future__ import annotations

import os
import sqlite3
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from runlane_server.core.errors import SettingsError, StartError, start_error
from runlane_server.store.base import Position
from runlane_server.store.compaction import CompactedPositions
from runlane_server.store.sqlfiles import migrations
from runlane_server.store.sqlite.connection import SqliteConnection, any_text
from runlane_server.store.sqlite.lock import FileLock, open_private
from runlane_server.store.sqlite.transaction import SQL

log = structlog.get_logger()

APPLICATION_ID = 0x52756E6C
"""The application id of our files: "Runl" in ASCII."""

CHECKPOINT_PAGES = 4_000
"""Pages of the write-ahead log that start a checkpoint: about 16 MiB."""


@dataclass(frozen=True, slots=True)
class OpenFile:
    """The connections to an open file, and the state of its log."""

    writer: SqliteConnection
    reader: SqliteConnection
    store_id: bytes
    position: Position
    compacted: CompactedPositions


_PASSING = {"SQLITE_FULL", "SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_NOMEM", "SQLITE_INTERRUPT"}
"""Errors after which another attempt may succeed, besides those of SQLITE_IOERR."""


async def open_file(path: Path, closing: AsyncExitStack) -> OpenFile:
    """Opens the file; `closing` will close it. Raises StartError."""
    closing.callback(_lock(path).release)
    _create(path)
    try:
        # The writer opens first and closes last: the last connection to close checkpoints.
        writer = await _connect(path, closing)
        version = await writer.work(_prepare, path)
        reader = await _connect(path, closing)
        await reader.work(make_read_only)
        store_id, position, compacted = await reader.work(_read_state)
    except sqlite3.Error as error:
        # An error of Python's own module has no name.
        name = getattr(error, "sqlite_errorname", "")
        kind = StartError if name in _PASSING else SettingsError
        raise kind(f"store {path}: {error}") from error
    log.info("store opened", path=str(path), schema=version, sqlite=sqlite3.sqlite_version)
    return OpenFile(writer, reader, store_id, position, compacted)


def _lock(path: Path) -> FileLock:
    if path.is_dir():
        raise SettingsError(f"store {path}: the path is a directory")
    if not path.parent.is_dir():
        raise SettingsError(f"store {path}: the directory {path.parent} does not exist")
    return FileLock(path)


def _create(path: Path) -> None:
    """Creates a missing file, before SQLite does it with the umask.

    It comes before the first connection: closing a descriptor of the file would drop the locks of
    SQLite in this process. SQLite gives the files beside it the same mode.
    """
    if not path.exists():
        try:
            os.close(open_private(path))
        except OSError as error:
            raise start_error(f"store {path}: {error.strerror}", error) from error


def _make_private(path: Path) -> None:
    """Takes the files of an older server, or of a copy, away from other users."""
    file = Path(os.path.realpath(path))
    for beside in ("", "-wal", "-shm", "-journal"):
        with suppress(FileNotFoundError):
            try:
                file.with_name(file.name + beside).chmod(0o600)
            except PermissionError as error:
                log.warning("store readable by others", path=str(path), error=error.strerror)


async def _connect(path: Path, closing: AsyncExitStack) -> SqliteConnection:
    connection = SqliteConnection(path)
    await closing.enter_async_context(connection)
    return connection


def _prepare(db: sqlite3.Connection, path: Path) -> int:
    """Sets up the write connection and migrates the schema; returns its version."""
    # Damaged text must not stop the writer.
    db.text_factory = any_text
    version = check_ours(db, path)
    _make_private(path)
    mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise SettingsError(f"store {path}: the file system does not support a write-ahead log")
    db.execute("PRAGMA synchronous = FULL")
    db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    for migration in migrations("sqlite")[version:]:
        version = migration.number
        db.executescript(
            f"BEGIN IMMEDIATE; {migration.sql};"
            f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {version}; COMMIT"
        )
    # Fails now, and not at the first write, if the file or its disk is read-only.
    db.execute("BEGIN IMMEDIATE")
    db.execute(SQL["name_store"])
    db.execute(SQL["drop_copies"])
    db.execute(SQL["set_compacted"], {"last": db.execute(SQL["compacted"]).fetchone()[0]})
    db.execute("COMMIT")
    return version


def check_ours(db: sqlite3.Connection, path: Path) -> int:
    """Returns the schema version of a file. Raises StartError, and changes nothing, if another
    program or a newer Runlane wrote it."""
    application_id = _pragma(db, "application_id")
    version = _pragma(db, "user_version")
    empty = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    if application_id != APPLICATION_ID and not (empty and application_id == version == 0):
        raise SettingsError(f"store {path}: the file is a database of another program")
    newest = len(migrations("sqlite"))
    if version > newest:
        raise SettingsError(
            f"store {path}: a newer Runlane wrote it (schema {version}, known {newest})"
        )
    return version


def make_read_only(db: sqlite3.Connection) -> None:
    """Prevents a connection from writing and from checkpointing."""
    db.execute("PRAGMA query_only = 1")
    db.execute("PRAGMA wal_autocheckpoint = 0")


def _read_state(db: sqlite3.Connection) -> tuple[bytes, Position, CompactedPositions]:
    compacted = db.execute(SQL["compacted"]).fetchone()[0]
    if type(compacted) is not int:
        raise StartError("store: the row 'compacted' of table meta is damaged; restore a backup")
    store_id: bytes = db.execute(SQL["store_id"]).fetchone()[0]
    last: int = db.execute(SQL["last_position"]).fetchone()[0]
    db.text_factory = any_text  # a damaged name must not stop the start
    by_tenant = {row["tenant"]: row["compacted"] for row in db.execute(SQL["tenant_logs"])}
    db.text_factory = str
    return store_id, max(last, compacted), CompactedPositions(by_tenant)


def _pragma(db: sqlite3.Connection, name: str) -> int:
    value: int = db.execute(f"PRAGMA {name}").fetchone()[0]
    return value
