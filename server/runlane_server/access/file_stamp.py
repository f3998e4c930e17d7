"""Detects changes of files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

Stamp = tuple[tuple[int, ...] | None, ...]


def stamp(paths: Iterable[Path]) -> Stamp:
    """A value that changes when a file is written, replaced or removed, also behind a link."""
    return tuple(_stamp(path) for path in paths)


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - the same, and faster
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
