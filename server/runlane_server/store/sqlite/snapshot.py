"""A database file as another process sees it: one read transaction, while a server may serve it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from runlane_server.core.errors import StartError
from runlane_server.store.sqlfiles import migrations
from runlane_server.store.sqlite.connection import BUSY_TIMEOUT
from runlane_server.store.sqlite.file import check_ours, restrict


@contextmanager
def snapshot_of(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection within a read transaction, which holds nobody up.

    It never writes and never checkpoints, which is the server's alone (see `sqlite`): read-only, it
    does not even as the last one to close. While it is open the server cannot use its write-ahead
    log anew, so that grows. Raises StartError.
    """
    if not path.is_file():
        raise StartError(f"store {path}: there is no such file")
    try:
        with closing(_open(path)) as db:
            version = check_ours(db, path)
            newest = len(migrations("sqlite"))
            if version < newest:
                raise StartError(
                    f"store {path}: was written by an older Runlane (schema {version}, now "
                    f"{newest}); a start of the server brings it up to date"
                )
            restrict(db)
            db.execute("BEGIN")
            yield db
    except sqlite3.Error as error:
        raise StartError(f"store {path}: {error}") from error


def _open(path: Path) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode=ro"
    return sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT, isolation_level=None)
