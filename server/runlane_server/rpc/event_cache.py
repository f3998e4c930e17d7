"""Caches of encoded events: each is encoded once for all subscribers."""

from __future__ import annotations

from collections.abc import Hashable

from runlane.v1 import run_service_pb2 as pb
from runlane_server.core.model import RunEvent
from runlane_server.rpc import convert, inputs
from runlane_server.rpc.cursor import Cursors
from runlane_server.store.base import LoggedComplete

MAX_BYTES = 4 << 20
"""Size of a cache. Subscribers that keep up read the same few events at about the same time; one
that lags pays for its own encoding."""

ENTRY_BYTES = 512
"""Bytes counted for each entry besides its response, because it also keeps the event."""


class _Encoded:
    """The latest encoded responses by their place, each with the event itself where a place may
    have several.

    The older half is evicted at once: finding the oldest entry of a dictionary, again and again,
    costs more than encoding it.
    """

    def __init__(self) -> None:
        self._newer: dict[Hashable, tuple[object, bytes]] = {}
        self._older: dict[Hashable, tuple[object, bytes]] = {}
        self._bytes = 0

    def of(self, place: Hashable, event: object = None) -> bytes | None:
        """The response of this very event; None if it is not here."""
        kept = self._newer.get(place) or self._older.get(place)
        return kept[1] if kept is not None and kept[0] is event else None

    def keep(self, place: Hashable, encoded: bytes, event: object = None) -> bytes:
        """Keeps a response, and returns it."""
        self._newer[place] = (event, encoded)
        self._bytes += len(encoded) + ENTRY_BYTES
        if self._bytes > MAX_BYTES // 2:
            self._older, self._newer, self._bytes = self._newer, {}, 0
        return encoded


class EventCache:
    """Encoded terminal events."""

    def __init__(self, cursors: Cursors) -> None:
        self._cursors = cursors
        self._encoded = _Encoded()

    def encode(self, event: LoggedComplete) -> bytes:
        """Returns the serialized SubscribeRunCompleteResponse of an event."""
        known = self._encoded.of(event.position)
        if known is not None:
            return known
        encoded = pb.SubscribeRunCompleteResponse(
            cursor=self._cursors.encode(event.tenant, event.position),
            run_complete=convert.run_complete(event.complete),
        ).SerializeToString()
        return self._encoded.keep(event.position, encoded)


class RunEventCache:
    """Encoded events of runs."""

    def __init__(self) -> None:
        self._encoded = _Encoded()

    def encode(self, session_id: str, event: RunEvent, *, is_shared: bool) -> bytes:
        """Returns the serialized SubscribeRunResponse of an event of that session.

        `is_shared` says whether others follow the run: most runs have one follower, and keeping an
        encoding costs as much.
        """
        place = (event.run_id, event.index)
        known = self._encoded.of(place, event) if is_shared else None
        if known is not None:
            return known
        response = pb.SubscribeRunResponse()
        inputs.fill_run_event(response.event, session_id, event)
        encoded = response.SerializeToString()
        return self._encoded.keep(place, encoded, event) if is_shared else encoded
