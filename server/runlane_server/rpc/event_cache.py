"""A cache of encoded terminal events: each is encoded once for all subscribers."""

from __future__ import annotations

from runlane.v1 import run_service_pb2 as pb
from runlane_server.rpc import convert
from runlane_server.rpc.cursor import Cursors
from runlane_server.store.base import LoggedComplete, Position

MAX_BYTES = 4 << 20
"""Size of the cache. Subscribers that keep up read the same few events at about the same time; one
that lags pays for its own encoding."""


class EventCache:
    """The latest encoded responses; the oldest are evicted first."""

    def __init__(self, cursors: Cursors) -> None:
        self._cursors = cursors
        self._responses: dict[Position, bytes] = {}
        self._bytes = 0

    def encode(self, event: LoggedComplete) -> bytes:
        """Returns the serialized SubscribeRunCompleteResponse of an event."""
        cached = self._responses.get(event.position)
        if cached is not None:
            return cached
        encoded = pb.SubscribeRunCompleteResponse(
            cursor=self._cursors.encode(event.tenant, event.position),
            run_complete=convert.run_complete(event.complete),
        ).SerializeToString()
        self._store(event.position, encoded)
        return encoded

    def _store(self, position: Position, encoded: bytes) -> None:
        self._responses[position] = encoded
        self._bytes += len(encoded)
        while self._bytes > MAX_BYTES:
            oldest = next(iter(self._responses))
            self._bytes -= len(self._responses.pop(oldest))
