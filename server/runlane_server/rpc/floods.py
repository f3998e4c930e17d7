"""Ends connections that send a flood of frames and make no call.

gRPC has no limit of frames that belong to no call, such as PRIORITY and WINDOW_UPDATE, and no
option bounds the memory in which it holds what it has not handled yet. So the bytes that each
connection has received are read from the kernel every second. The bytes of a call that is
admitted have limits of their own (`access/call_limits.py`, `requests.py`).
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress

import structlog

from runlane_server.access.log_limit import LogLimit
from runlane_server.rpc.connection_shares import duplicate, open_sockets, peer_host

log = structlog.get_logger()

FLOOD_BYTES = 4 << 20
"""Bytes that a connection may send between two looks without a call: more than a client needs, as
its messages are held back until they are read."""

SECONDS = 1.0
"""Seconds between two looks."""

SUSPECT_SECONDS = 0.1
"""The same after a look that saw a flood."""

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""A `linger` of zero seconds: a caller that waits to send more learns of the end at once."""

PAUSE = 10
"""After a look that saw a flood, at least this many times its processor time passes until the next:
a look takes longer the more connections there are."""

_RECEIVED = struct.Struct("=Q")

_RECEIVED_AT = 128
"""The place of `tcpi_bytes_received` in the `tcp_info` of Linux 4.1 and later."""


class Floods:
    """Closes connections that flood. Not for several threads at once."""

    def __init__(self) -> None:
        # By the inode of each socket: the host and port at its other end (None if they could not
        # be read), and what a connection without a call had received at the last look.
        self._peers: dict[int, tuple[str, int] | None] = {}
        self._received: dict[int, int] = {}
        # Those that flooded and have had no call since. Their bytes may belong to calls that
        # wait to be admitted, so a connection is closed only if it floods again.
        self._suspects: set[int] = set()
        self._floods = 0
        self._calling: set[int] = set()
        self._log_limit = LogLimit(time.monotonic)

    async def look(self, ports: Collection[int], calling: Collection[int]) -> float:
        """Closes connections to `ports` that flood; returns the seconds until the next look.

        `calling` are the ports of known callers with open calls, or any since the last look.
        """
        self._calling |= set(calling)
        try:
            closed, took = await asyncio.to_thread(self._timed_close, ports, self._calling)
        except OSError:  # no descriptor is left; a later look finds one, and needs these calls
            return SECONDS
        self._calling = set()
        for address, count in closed.items():
            if self._log_limit.admits(address):
                log.warning(
                    "connections closed; they sent a flood without a call",
                    address=address,
                    count=count,
                )
        if not self._floods:
            return SECONDS
        return min(SECONDS, max(SUSPECT_SECONDS, PAUSE * took))

    def _timed_close(
        self, ports: Collection[int], calling: Collection[int]
    ) -> tuple[Counter[str], float]:
        began = time.thread_time()
        return self.close(ports, calling), time.thread_time() - began

    def close(self, ports: Collection[int], calling: Collection[int]) -> Counter[str]:
        """Closes connections that flood for the second time; returns how many of each host.

        Raises OSError if no descriptor is left; nothing was done then.
        """
        sockets = open_sockets()
        closed: Counter[str] = Counter()
        received: dict[int, int] = {}
        suspects: set[int] = set()
        known, self._peers = self._peers, {}
        self._floods = 0
        for inode, descriptor in sockets.items():
            peer = self._peers[inode] = known.get(inode) or _peer_of(descriptor, ports)
            # Most connections have a call: they cost no more than this.
            if peer is None or not peer[0] or peer[1] in calling:
                continue
            host = peer[0]
            # The descriptor may be closed, or belong to another socket.
            with suppress(OSError), duplicate(descriptor) as connection:
                received[inode] = _received(connection)
                # Nothing is known of what it sent for a call.
                before = self._received.get(inode, received[inode]) if inode in known else 0
                floods = received[inode] - before > FLOOD_BYTES
                self._floods += floods
                if floods and inode in self._suspects:
                    if peer_host(connection, ports) == host:
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                        connection.shutdown(socket.SHUT_RDWR)
                        closed[host] += 1
                elif floods or inode in self._suspects:
                    suspects.add(inode)
        self._received, self._suspects = received, suspects
        return closed


def _peer_of(descriptor: int, ports: Collection[int]) -> tuple[str, int] | None:
    """The host and the port at the other end; an empty host if it is no connection to `ports`.

    None if it cannot be read now, as without a descriptor.
    """
    with suppress(OSError), duplicate(descriptor) as connection:
        host = peer_host(connection, ports)
        return host, connection.getpeername()[1] if host else 0
    return None


def _received(connection: socket.socket) -> int:
    size = _RECEIVED_AT + _RECEIVED.size
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
    # An older kernel reports less.
    found: int = _RECEIVED.unpack_from(info, _RECEIVED_AT)[0] if len(info) == size else 0
    return found
