"""Terminal events as they go out: encoded once, however many subscribers there are."""

from __future__ import annotations

from runlane.v1 import run_service_pb2 as pb
from runlane_server.rpc import convert
from runlane_server.rpc.cursor import Cursors
from runlane_server.store.base import LoggedComplete, Position

KEPT_BYTES = 4 << 20
"""How much is kept. Subscribers that keep up want the same few events at about the same time; one
that lags pays for its own."""


class EventCache:
    """The latest responses that were encoded; the oldest are forgotten first."""

    def __init__(self, cursors: Cursors) -> None:
        self._cursors = cursors
        self._kept: dict[Position, bytes] = {}
        self._bytes = 0

    def response(self, event: LoggedComplete) -> bytes:
        """The serialized SubscribeRunCompleteResponse of an event: one for all of its tenant."""
        known = self._kept.get(event.position)
        if known is not None:
            return known
        encoded = pb.SubscribeRunCompleteResponse(
            cursor=self._cursors.encode(event.tenant, event.position),
            run_complete=convert.run_complete(event.complete),
        ).SerializeToString()
        self._keep(event.position, encoded)
        return encoded

    def _keep(self, position: Position, encoded: bytes) -> None:
        self._kept[position] = encoded
        self._bytes += len(encoded)
        while self._bytes > KEPT_BYTES:
            oldest = next(iter(self._kept))
            self._bytes -= len(self._kept.pop(oldest))
