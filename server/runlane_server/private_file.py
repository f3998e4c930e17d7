"""Reads files of secrets that settings name."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from runlane_server.core.errors import SettingsError, start_error

_OTHERS = stat.S_IRWXO | stat.S_IWGRP
"""Access that no other user may have. The group may read, for a server with a user of its own."""


def read_private_lines(path: Path, option: str) -> Sequence[str]:
    """The lines of a file.

    Raises StartError, which begins with `option`, for a file that cannot be read, that is not
    UTF-8, or that other users of this machine can read or write.
    """
    try:
        with path.open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            lines = file.read().splitlines()
    except OSError as error:
        raise start_error(f"{option}: {path}: {error.strerror}", error) from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{option}: {path} is not UTF-8 text") from error
    if mode & _OTHERS:
        raise SettingsError(
            f"{option}: other users of this machine have access to {path}; run: chmod 600 {path}"
        )
    return lines
