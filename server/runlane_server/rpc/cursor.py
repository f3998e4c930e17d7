"""Cursors: opaque positions in the event log of one store."""

from __future__ import annotations

import struct
from functools import lru_cache

from runlane_server.core.errors import CursorInvalid
from runlane_server.rpc.seal import Seal
from runlane_server.store.base import Position

_LAYOUT = struct.Struct(">Q")
_CACHED_TENANTS = 1024
_CACHED_CURSORS = 256


class Cursors:
    """Encodes and decodes the cursors of one store. A cursor is valid for one tenant only."""

    def __init__(self, store_id: bytes) -> None:
        def seal(tenant: str) -> Seal:
            return Seal(store_id, "cursor", tenant)

        self._seal = lru_cache(_CACHED_TENANTS)(seal)
        # Accepts between two terminal events have the same cursor, as have all their subscribers.
        self._encoded = lru_cache(_CACHED_CURSORS)(self._encode)

    def encode(self, tenant: str, position: Position) -> str:
        """Returns the cursor of a position; 28 characters."""
        return self._encoded(tenant, position)

    def _encode(self, tenant: str, position: Position) -> str:
        return self._seal(tenant).close(_LAYOUT.pack(position))

    def decode(self, tenant: str, cursor: str) -> Position:
        """Returns the position of a cursor. Raises CursorInvalid."""
        payload = self._seal(tenant).open(cursor)
        if payload is None or len(payload) != _LAYOUT.size:
            raise CursorInvalid.of("cursor", "was not issued by this service for this store")
        (position,) = _LAYOUT.unpack(payload)
        return int(position)
