"""What comes of looking at what a caller shows."""

from __future__ import annotations

from typing import NamedTuple

from runlane_server.access.caller import Caller


class Known(NamedTuple):
    """Who it is, and until when that holds: seconds since 1970; None: as long as the entry is
    there."""

    caller: Caller
    until: float | None = None


class Refused(Exception):
    """Nobody that is known. Why is for the log; `told` goes with it and never holds a secret."""

    def __init__(self, why: str, **told: str) -> None:
        super().__init__(why)
        self.why = why
        self.told = told
