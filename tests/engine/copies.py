"""Copies a store while a node writes to it: the state that a kill would leave."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

from runlane_server.store.open import can_be_shared, database_path, open_store


@asynccontextmanager
async def copy_of(url: str, folder: Path) -> AsyncIterator[str]:
    """Yields the URL of a copy of everything committed so far, and deletes the copy afterwards."""
    if not can_be_shared(url):
        copy = folder / "copy.db"
        with (
            closing(sqlite3.connect(database_path(url))) as source,
            closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
        yield f"sqlite:///{copy}"
        return
    from support.postgres import copy_rows, fresh_database  # noqa: PLC0415 - an optional extra

    async with fresh_database(url) as other:
        async with open_store(other):
            pass
        await copy_rows(url, other)
        yield other
