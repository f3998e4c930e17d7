"""Cursors: opaque places in the event log of one store."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from runlane_server.core.errors import CursorInvalid, Violation
from runlane_server.rpc.seal import seal, unseal
from runlane_server.store.base import Position

_LAYOUT = struct.Struct(">8sQ")


@dataclass(frozen=True, slots=True)
class Cursors:
    """Makes and reads the cursors of the store with that id of 8 bytes."""

    store_id: bytes

    def encode(self, position: Position) -> str:
        """The cursor that stands for a position; 28 characters."""
        return seal(_LAYOUT.pack(self.store_id, position))

    def decode(self, cursor: str) -> Position:
        """The position that a cursor stands for. Raises CursorInvalid."""
        payload = unseal(cursor)
        if payload is None or len(payload) != _LAYOUT.size:
            raise _invalid("is not one that this service gave out")
        store_id, position = _LAYOUT.unpack(payload)
        if store_id != self.store_id:
            raise _invalid("belongs to another store")
        return int(position)


def _invalid(description: str) -> CursorInvalid:
    return CursorInvalid(f"cursor: {description}", violations=[Violation("cursor", description)])
