"""Cursors: opaque places in the event log of one store."""

from __future__ import annotations

import hashlib
import struct
from functools import lru_cache

from runlane_server.core.errors import CursorInvalid, Violation
from runlane_server.rpc.seal import seal, unseal
from runlane_server.store.base import Position

_LAYOUT = struct.Struct(">8sQ")


_TENANTS_KEPT = 1024


class Cursors:
    """Makes and reads the cursors of the store with that id of 8 bytes. They are a tenant's own."""

    def __init__(self, store_id: bytes) -> None:
        def bind(tenant: str) -> bytes:
            return hashlib.blake2b(tenant.encode(), key=store_id, digest_size=8).digest()

        self._binding = lru_cache(_TENANTS_KEPT)(bind)

    def encode(self, tenant: str, position: Position) -> str:
        """The cursor that stands for a position; 28 characters."""
        return seal(_LAYOUT.pack(self._binding(tenant), position))

    def decode(self, tenant: str, cursor: str) -> Position:
        """The position that a cursor stands for. Raises CursorInvalid."""
        payload = unseal(cursor)
        if payload is None or len(payload) != _LAYOUT.size:
            raise _invalid("is not one that this service gave out")
        binding, position = _LAYOUT.unpack(payload)
        if binding != self._binding(tenant):
            raise _invalid("belongs to another store")
        return int(position)


def _invalid(description: str) -> CursorInvalid:
    return CursorInvalid(f"cursor: {description}", violations=[Violation("cursor", description)])
