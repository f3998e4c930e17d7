"""What one node takes on."""

from __future__ import annotations

from dataclasses import dataclass

RETRY_PAUSE = 1.0
"""Seconds after which it is tried again what a store in trouble did not do."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one node takes on. Sizes are in bytes of UTF-8, times in seconds."""

    max_active_runs: int = 256
    max_waiting_runs: int = 64
    max_waiting_total: int = 200_000
    max_prompt_bytes: int = 1 << 20
    max_attachment_bytes: int = 2 << 20
    cancel_grace: float = 5.0
    ready_timeout: float = 60.0
