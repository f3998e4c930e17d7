"""Cursors: opaque positions in the event log of one store."""

from __future__ import annotations

import hashlib
import struct
from functools import lru_cache

from runlane_server.core.errors import CursorInvalid
from runlane_server.rpc.seal import seal, unseal
from runlane_server.store.base import Position

_LAYOUT = struct.Struct(">8sQ")
_CACHED_TENANTS = 1024


class Cursors:
    """Encodes and decodes the cursors of one store. A cursor is valid for one tenant only."""

    def __init__(self, store_id: bytes) -> None:
        def bind(tenant: str) -> bytes:
            return hashlib.blake2b(tenant.encode(), key=store_id, digest_size=8).digest()

        self._binding = lru_cache(_CACHED_TENANTS)(bind)

    def encode(self, tenant: str, position: Position) -> str:
        """Returns the cursor of a position; 28 characters."""
        return seal(_LAYOUT.pack(self._binding(tenant), position))

    def decode(self, tenant: str, cursor: str) -> Position:
        """Returns the position of a cursor. Raises CursorInvalid."""
        payload = unseal(cursor)
        if payload is None or len(payload) != _LAYOUT.size:
            raise CursorInvalid.of("cursor", "was not issued by this service")
        binding, position = _LAYOUT.unpack(payload)
        if binding != self._binding(tenant):
            raise CursorInvalid.of("cursor", "belongs to another store")
        return int(position)
