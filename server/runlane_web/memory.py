"""Hides the memory of this process, which holds the tokens of its callers."""

from __future__ import annotations

import ctypes
import sys

_PR_SET_DUMPABLE = 4


def protect_memory() -> None:
    """Hides this process from others of the same user, which are not root.

    They can no longer read its environment, memory and file descriptors in /proc, nor attach a
    debugger. Does nothing except on Linux.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
