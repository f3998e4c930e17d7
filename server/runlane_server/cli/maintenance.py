"""Maintenance of a database: backup and check, also while a server uses it, and renew, before."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from runlane_server.core.errors import StartError
from runlane_server.store.findings import Counts, Findings
from runlane_server.store.open import StoreUrl, check_driver
from runlane_server.store.sqlite.backup import back_up
from runlane_server.store.sqlite.check import check as check_file
from runlane_server.store.sqlite.repair import repair as repair_file


def backup(store: StoreUrl, target: Path, *, force: bool) -> str:
    """Copies the database of a store to a file; returns a line that describes the copy.

    Raises StartError.
    """
    begun = time.monotonic()
    made = back_up(store.file, target, force=force)
    return f"{target}: {made.size} bytes, {_contents(made.counts)}, in {_since(begun)}"


def check(store: StoreUrl) -> tuple[Sequence[str], int]:
    """Verifies the database of a store; returns the lines to print, and the exit code.

    Raises StartError.
    """
    begun = time.monotonic()
    name, findings = _check(store)
    if findings.counts is None:
        return findings.problems, 1
    return [f"{name}: no problems in {_contents(findings.counts)}, in {_since(begun)}"], 0


def repair(store: StoreUrl, copy: Path | None) -> tuple[Sequence[str], int]:
    """Repairs the database of a store, after a copy of a file was written to `copy`; returns the
    lines to print, and the exit code: that of a check afterwards.

    Raises StartError.
    """
    lines = []
    if copy is not None:
        if store.database is not None:
            raise StartError(
                "check: --backup copies a SQLite file; back PostgreSQL up with pg_dump, and give"
                " --no-backup"
            )
        lines.append(backup(store, copy, force=False))
    repaired = asyncio.run(_repair(store))
    found, code = check(store)
    return [*lines, *(repaired or ["nothing to repair"]), *found], code


async def _repair(store: StoreUrl) -> Sequence[str]:
    if store.database is None:
        if not store.file.is_file():
            raise StartError(f"store {store.file}: the file does not exist")
        return await repair_file(store.file)
    check_driver()
    from runlane_server.store.postgres.repair import repair as repair_database  # noqa: PLC0415

    return await repair_database(store.database)


def _check(store: StoreUrl) -> tuple[str, Findings]:
    """The name of the database, and what is wrong with it."""
    if store.database is None:
        return str(store.file), check_file(store.file)
    check_driver()
    from runlane_server.store.postgres.check import check as check_database  # noqa: PLC0415

    return store.database.label, asyncio.run(check_database(store.database))


def renew(store: StoreUrl) -> str:
    """Gives the database of a store a new id; returns the line to print.

    Raises StartError.
    """
    if store.database is None:
        raise StartError(
            "renew: needs a PostgreSQL store; a copy made by 'backup' gets its id at first use"
        )
    check_driver()
    from runlane_server.store.postgres.renew import renew as renew_database  # noqa: PLC0415

    return asyncio.run(renew_database(store.database))


def rotate_node_key(store: StoreUrl) -> str:
    """Gives the nodes of a store a new key for their calls; returns the line to print.

    Raises StartError.
    """
    if store.database is None:
        raise StartError("rotate-node-key: needs a PostgreSQL store; other stores have one node")
    check_driver()
    from runlane_server.store.postgres.renew import rotate_node_key as rotate  # noqa: PLC0415

    return asyncio.run(rotate(store.database))


def _contents(counts: Counts) -> str:
    return f"{counts.sessions} sessions, {counts.runs} runs, {counts.events} terminal events"


def _since(begun: float) -> str:
    return f"{time.monotonic() - begun:.1f} s"
