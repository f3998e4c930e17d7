"""What is done to the database of a server from outside: backup and check, also while it serves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from runlane_server.store.sqlite_backup import back_up
from runlane_server.store.sqlite_check import Counts
from runlane_server.store.sqlite_check import check as check_file
from runlane_server.stores import database_path


def backup(store: str, target: Path, *, force: bool) -> str:
    """Copies the database of a store to a file; returns what is to be said of it.

    Raises StartError.
    """
    begun = time.monotonic()
    made = back_up(database_path(store), target, force=force)
    return f"{target}: {made.size} bytes, {_contents(made.counts)}, in {_since(begun)}"


def check(store: str) -> tuple[Sequence[str], int]:
    """Verifies the database of a store; returns what is to be said of it, and the exit code.

    Raises StartError.
    """
    begun = time.monotonic()
    path = database_path(store)
    findings = check_file(path)
    if findings.counts is None:
        return findings.problems, 1
    return [f"{path}: nothing is wrong with {_contents(findings.counts)}, in {_since(begun)}"], 0


def _contents(counts: Counts) -> str:
    return f"{counts.sessions} sessions, {counts.runs} runs, {counts.events} terminal events"


def _since(begun: float) -> str:
    return f"{time.monotonic() - begun:.1f} s"
