"""Requests of a process to the Linux kernel about itself. Elsewhere these functions do nothing."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

_OOM_SCORE = "500"

_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36


def protect_memory() -> None:
    """Hides this process from others of the same user, which are not root.

    They can no longer read its environment, memory and file descriptors in /proc, nor attach a
    debugger; it writes no core dump. A fork inherits this, an exec ends it.
    """
    _prctl(_PR_SET_DUMPABLE, 0)


def adopt_orphans() -> None:
    """Makes this process the parent of every descendant whose own parent has ended."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_first() -> None:
    """Makes the kernel end this process before others if memory runs out. Call it before
    `protect_memory`."""
    with suppress(OSError):  # not Linux, or not allowed
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
