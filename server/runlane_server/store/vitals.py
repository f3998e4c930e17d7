"""The vital signs of a store, for metrics."""

from __future__ import annotations

from dataclasses import dataclass

from runlane_server.core.model import Micros


@dataclass(frozen=True, slots=True)
class StoreVitals:
    """Measurements of a store; None for what it cannot know, or does not have.

    `size` and `free` are bytes: those of the store, and those left on its disk. The others are the
    times at which the oldest waiting run was accepted and the oldest open input request was made.
    """

    size: int | None = None
    free: int | None = None
    waiting_since: Micros | None = None
    asking_since: Micros | None = None
