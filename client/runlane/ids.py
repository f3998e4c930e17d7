"""Generates ids on the client, so that a retried call does not do its work twice."""

from __future__ import annotations

import secrets
import time
import uuid


def new_id() -> str:
    """Returns a UUIDv7 (RFC 9562, section 5.7), which sorts by its creation time."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds & 0xFFFF_FFFF_FFFF) << 80 | secrets.randbits(80)
    value = value & ~(0xF << 76) | 0x7 << 76  # the version
    value = value & ~(0x3 << 62) | 0x2 << 62  # the variant
    return str(uuid.UUID(int=value))
