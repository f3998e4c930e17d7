"""Copies a store while a node writes to it: the state that a kill would leave."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

from runlane_server.store.open import StoreUrl, open_store


@asynccontextmanager
async def copy_of(url: str, folder: Path) -> AsyncIterator[str]:
    """Yields the URL of a copy of everything committed so far, and deletes the copy afterwards."""
    store_url = StoreUrl.parse(url)
    if not store_url.is_shareable:
        copy = folder / "copy.db"
        with (
            closing(sqlite3.connect(store_url.file)) as source,
            closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
        yield f"sqlite:///{copy}"
        return
    from support.postgres import copy_rows, fresh_database  # noqa: PLC0415 - an optional extra

    async with fresh_database(url) as other:
        async with open_store(StoreUrl.parse(other)):
            pass
        await copy_rows(url, other)
        yield other


async def execute(url: str, statement: str) -> None:
    """Changes a store that no node uses, as damage or a defect would."""
    store_url = StoreUrl.parse(url)
    if not store_url.is_shareable:
        with closing(sqlite3.connect(store_url.file)) as database, database:
            database.execute(statement)
        return
    from runlane_server.store.postgres.database import Database  # noqa: PLC0415
    from support.postgres import plain  # noqa: PLC0415 - an optional extra

    connection = await plain(url)
    await connection.execute(f"SET search_path TO {Database.parse(url).schema}")
    await connection.execute(statement)
    await connection.close()
