"""How a SQLite file is opened: locked, checked to be one of ours, brought up to date."""

from __future__ import annotations

import sqlite3
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import structlog

from runlane_server.core.errors import StartError
from runlane_server.store.base import Position
from runlane_server.store.sqlfiles import migrations
from runlane_server.store.sqlite.apply import SQL
from runlane_server.store.sqlite.connection import SqliteConnection
from runlane_server.store.sqlite.lock import FileLock

log = structlog.get_logger()

APPLICATION_ID = 0x52756E6C
"""Marks a SQLite file as Runlane's: "Runl"."""

CHECKPOINT_PAGES = 4_000
"""How long the write-ahead log grows before it is copied into the database: about 16 MiB."""


@dataclass(frozen=True, slots=True)
class Opened:
    """An open file, and what is known of it."""

    writer: SqliteConnection
    reader: SqliteConnection
    store_id: bytes
    position: Position
    compacted: Position


async def open_file(path: Path, closing: AsyncExitStack) -> Opened:
    """Opens the file, and leaves to `closing` how it is closed. Raises StartError."""
    closing.callback(_lock(path).release)
    try:
        # The writer is opened first and closed last: the last one to close checkpoints.
        writer = await _connect(path, closing)
        version = await writer.work(_prepare, path)
        reader = await _connect(path, closing)
        await reader.work(restrict)
        store_id, position, compacted = await reader.work(_read_state)
    except sqlite3.Error as error:
        raise StartError(f"store {path}: {error}") from error
    log.info("store opened", path=str(path), schema=version, sqlite=sqlite3.sqlite_version)
    return Opened(writer, reader, store_id, position, compacted)


def _lock(path: Path) -> FileLock:
    if path.is_dir():
        raise StartError(f"store {path}: is a directory")
    if not path.parent.is_dir():
        raise StartError(f"store {path}: there is no directory {path.parent}")
    return FileLock(path)


async def _connect(path: Path, closing: AsyncExitStack) -> SqliteConnection:
    connection = SqliteConnection(path)
    await closing.enter_async_context(connection)
    return connection


def _prepare(db: sqlite3.Connection, path: Path) -> int:
    """Makes the write connection fit to write; returns the version of the schema."""
    version = check_ours(db, path)
    mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise StartError(f"store {path}: its file system does not allow a write-ahead log")
    db.execute("PRAGMA synchronous = FULL")
    db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    for migration in migrations("sqlite")[version:]:
        version = migration.number
        db.executescript(
            f"BEGIN IMMEDIATE; {migration.sql};"
            f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {version}; COMMIT"
        )
    # Says at start what the first write would say: that the file or its disk is read-only.
    db.execute("BEGIN IMMEDIATE")
    db.execute(SQL["name_store"])
    db.execute(SQL["set_compacted"], {"last": db.execute(SQL["compacted"]).fetchone()[0]})
    db.execute("COMMIT")
    return version


def check_ours(db: sqlite3.Connection, path: Path) -> int:
    """Refuses a file that is not ours before anything is changed in it; returns its version."""
    application_id = _pragma(db, "application_id")
    version = _pragma(db, "user_version")
    empty = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    if application_id != APPLICATION_ID and not (empty and application_id == version == 0):
        raise StartError(f"store {path}: is a database of some other program")
    newest = len(migrations("sqlite"))
    if version > newest:
        raise StartError(
            f"store {path}: was written by a newer Runlane (schema {version}, known {newest})"
        )
    return version


def restrict(db: sqlite3.Connection) -> None:
    """Makes sure that a connection never writes and never checkpoints."""
    db.execute("PRAGMA query_only = 1")
    db.execute("PRAGMA wal_autocheckpoint = 0")


def _read_state(db: sqlite3.Connection) -> tuple[bytes, Position, Position]:
    store_id: bytes = db.execute(SQL["store_id"]).fetchone()[0]
    compacted: int = db.execute(SQL["compacted"]).fetchone()[0]
    last: int = db.execute(SQL["last_position"]).fetchone()[0]
    return store_id, max(last, compacted), compacted


def _pragma(db: sqlite3.Connection, name: str) -> int:
    value: int = db.execute(f"PRAGMA {name}").fetchone()[0]
    return value
