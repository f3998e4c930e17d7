"""The key `q`, which leaves a view that runs until it is interrupted."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def quit_key(leave: Callable[[], None]) -> Iterator[None]:
    """Calls `leave` when `q` is pressed, while the context is open.

    Without a terminal on stdin, or in the background, no key is read.
    """
    if sys.platform == "win32" or not _reads_keys():
        yield
        return
    # There are none on Windows, where Ctrl-C remains.
    import termios  # noqa: PLC0415
    import tty  # noqa: PLC0415

    descriptor, loop = sys.stdin.fileno(), asyncio.get_running_loop()

    def read() -> None:
        keys = os.read(descriptor, 64)
        if b"q" in keys.lower():
            leave()
        if not keys:  # the terminal is gone
            loop.remove_reader(descriptor)

    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)  # keys arrive at once and are not shown; Ctrl-C stays a signal
    loop.add_reader(descriptor, read)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _reads_keys() -> bool:
    if sys.platform == "win32" or sys.stdin is None or not sys.stdin.isatty():
        return False
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except OSError:
        return False
