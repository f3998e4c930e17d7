"""The end of stdout and stderr of a command.

Text that cannot be written, because its reader is gone or the disk is full, stays in the buffer of
the stream. Python then exits with 120 instead of the exit code of the command.
"""

from __future__ import annotations

import atexit
import os
import sys
from typing import TextIO


def keep_exit_code() -> None:
    """Makes this process end with its own exit code, even if its last output cannot be written."""
    atexit.register(_discard_unwritable)


def discard(stream: TextIO) -> None:
    """Discards the text in the buffer of a stream, and later text."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)


def _discard_unwritable() -> None:
    for stream in (sys.stdout, sys.stderr):
        # None if the process was started with the stream closed.
        if stream is None or stream.closed:
            continue
        try:
            stream.flush()
        except OSError:
            discard(stream)
