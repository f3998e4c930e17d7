"""The controlling terminal of the server: whether it was lost since the start."""

from __future__ import annotations

import os


class ControllingTerminal:
    """The terminal from which the server was started, if any.

    Closing its window or its connection sends SIGHUP, as an operator's `kill -HUP` does.
    """

    def __init__(self) -> None:
        self._existed = _exists()

    @property
    def is_lost(self) -> bool:
        """Whether there was a terminal at the start, and is none now."""
        return self._existed and not _exists()


def _exists() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
