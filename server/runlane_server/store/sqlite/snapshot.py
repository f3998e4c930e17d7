"""A database file read by another process than its server: one read transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from runlane_server.core.errors import StartError
from runlane_server.store.sqlfiles import migrations
from runlane_server.store.sqlite.connection import BUSY_TIMEOUT
from runlane_server.store.sqlite.file import check_ours, make_read_only


@contextmanager
def snapshot_of(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection in a read transaction, which blocks no one.

    It never writes and never checkpoints, as only the server's writer may (see `sqlite.store`): a
    read-only connection does not checkpoint even when it is the last to close. While it is open,
    the server cannot reuse its write-ahead log, which grows. Raises StartError.
    """
    if not path.is_file():
        raise StartError(f"store {path}: the file does not exist")
    try:
        with closing(_open(path)) as db:
            version = check_ours(db, path)
            newest = len(migrations("sqlite"))
            if version < newest:
                raise StartError(
                    f"store {path}: an older Runlane wrote it (schema {version}, now {newest});"
                    " start the server once to migrate it"
                )
            make_read_only(db)
            db.execute("BEGIN")
            yield db
    except sqlite3.Error as error:
        raise StartError(f"store {path}: {error}") from error


def _open(path: Path) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode=ro"
    return sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT, isolation_level=None)
