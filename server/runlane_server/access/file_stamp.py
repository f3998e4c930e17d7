"""Notices that files have changed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

Stamp = tuple[tuple[int, ...] | None, ...]


def stamp(paths: Iterable[Path]) -> Stamp:
    """What differs once a file was written, replaced or removed, also behind a symbolic link."""
    return tuple(_of(path) for path in paths)


def _of(path: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - the same, and quicker
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
