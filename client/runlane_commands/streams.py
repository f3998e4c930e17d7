"""The end of stdout and stderr of a command.

Text that cannot be written, because its reader is gone or the disk is full, stays in the buffer of
the stream. Python then exits with 120 instead of the exit code of the command.
"""

from __future__ import annotations

import atexit
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_UNWRITABLE = {errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO}


def keep_exit_code() -> None:
    """Makes this process end with its own exit code, even if its last output cannot be written."""
    atexit.register(_discard_unwritable)


@contextmanager
def reporting_output(name: str) -> Iterator[None]:
    """Ends the process with exit code 1 if its output cannot be written, and says why, unless the
    reader has only left. `name` is that of the command."""
    try:
        yield
    except OSError as error:
        # An error of a file, unlike that of a stream, has its name.
        if error.errno not in _UNWRITABLE or error.filename is not None:
            raise
        if error.errno != errno.EPIPE:
            sys.stderr.write(f"{name}: error: the output cannot be written: {error.strerror}\n")
        sys.exit(1)


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
