"""Cursors of streams of sessions: opaque positions, each in one session of one store."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence

from runlane_server.core.errors import CursorInvalid
from runlane_server.feed.sessions import SessionPlace
from runlane_server.rpc.seal import Seal

_LAYOUT = struct.Struct(">8sQQQ")


class SessionCursors:
    """Encodes and decodes cursors of sessions. A cursor is valid for one tenant only."""

    def __init__(self, store_id: bytes, tenant: str) -> None:
        self._seal = Seal(store_id, "session cursor", tenant)

    def encode(self, session_id: str, at: SessionPlace) -> str:
        """Returns the cursor of a position; empty for that before a session exists."""
        if not at.created_at:
            return ""
        fixed = _LAYOUT.pack(_name(session_id), at.created_at, at.place, at.event_index)
        return self._seal.close(fixed + at.run_id.encode())

    def decode(
        self, session_ids: Sequence[str], cursors: Sequence[str]
    ) -> Mapping[str, SessionPlace | None]:
        """Returns the positions of sessions, None without a cursor. Raises CursorInvalid."""
        names = {_name(session_id): session_id for session_id in session_ids}
        places: dict[str, SessionPlace | None] = dict.fromkeys(session_ids)
        for n, cursor in enumerate(cursors):
            payload = self._seal.open(cursor)
            if payload is None or len(payload) < _LAYOUT.size:
                raise CursorInvalid.of(
                    f"cursors[{n}]", "was not issued by this service for this store"
                )
            name, created_at, place, index = _LAYOUT.unpack_from(payload)
            session_id = names.get(name)
            if session_id is None:
                raise CursorInvalid.of(f"cursors[{n}]", "is of a session that session_ids lacks")
            if places[session_id] is not None:
                raise CursorInvalid.of(f"cursors[{n}]", "is the second one of its session")
            run_id = payload[_LAYOUT.size :].decode()
            places[session_id] = SessionPlace(created_at, place, run_id, index)
        return places


def _name(session_id: str) -> bytes:
    return hashlib.blake2b(session_id.encode(), digest_size=8).digest()
