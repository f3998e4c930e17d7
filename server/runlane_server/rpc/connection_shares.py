"""Bounds the connections of each address, so that one address cannot take all of them.

gRPC bounds the connections in total and has no hook for one that is accepted. So the descriptors of
this process are looked through every second, and connections above the share of their address are
shut down, the newest first. That needs no credentials of the caller: it is before authentication.

A Unix socket has no addresses; its file mode decides who can connect.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

import structlog

from runlane_server.access.log_limit import LogLimit

log = structlog.get_logger()

SECONDS = 1.0
"""Seconds between two looks at the connections."""

CROWDED_SECONDS = 0.1
"""The same while an address has more than its share."""

_DESCRIPTORS = "/dev/fd"

_NETWORK_BITS = 64
"""Bits of an IPv6 address that count: one customer gets a network of this size (RFC 6177)."""


class ConnectionShares:
    """Closes the connections of an address above `share`. Not for several threads at once."""

    def __init__(self, share: int) -> None:
        self.share = share
        # The host of each open socket by its inode, oldest first; empty for other sockets.
        self._hosts: dict[int, str] = {}
        self._log_limit = LogLimit(time.monotonic)

    async def look(self, ports: Collection[int]) -> float:
        """Closes connections above the shares; returns the seconds until the next look."""
        try:
            closed = await asyncio.to_thread(self.close_excess, ports)
        except OSError:  # no descriptor is left; a later look finds one
            return SECONDS
        for address, count in closed.items():
            if self._log_limit.admits(address):
                log.warning(
                    "connections closed; their address has too many",
                    address=address,
                    count=count,
                    limit=self.share,
                )
        return CROWDED_SECONDS if closed else SECONDS

    def close_excess(self, ports: Collection[int]) -> Counter[str]:
        """Closes connections to the ports; returns how many of each host.

        Raises OSError if no descriptor is left; nothing was done then.
        """
        closed: Counter[str] = Counter()
        sockets = open_sockets()
        if len(sockets) <= self.share:
            return closed
        hosts = {inode: peer for inode, peer in self._hosts.items() if inode in sockets}
        for inode, descriptor in sockets.items():
            if inode not in hosts:
                hosts[inode] = _host_of(descriptor, ports)
        self._hosts = hosts
        counts: Counter[str] = Counter()
        for inode, peer in hosts.items():
            counts[peer] += 1
            excess = peer and counts[peer] > self.share
            if excess and _shut_down(sockets[inode], peer, ports):
                closed[peer] += 1
        return closed


@lru_cache(maxsize=4096)
def host(address: str) -> str:
    """Returns the host that an IP address counts as: itself, or the IPv6 network it is in."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address):
        mapped: IPv4Address | None = ip.ipv4_mapped
        return str(mapped or IPv6Network((int(ip), _NETWORK_BITS), strict=False))
    return str(ip)


def open_sockets() -> dict[int, int]:
    """The descriptor of each open socket of this process, by its inode.

    Raises OSError if there is no descriptor left to read them with.
    """
    found = {}
    for name in os.listdir(_DESCRIPTORS):  # noqa: PTH208 - they are thousands, each second
        with suppress(OSError):  # it was closed meanwhile
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found[status.st_ino] = int(name)
    return found


def duplicate(descriptor: int) -> socket.socket:
    """A socket with a descriptor of its own, which no other thread closes. Raises OSError."""
    duplicate = os.dup(descriptor)
    try:
        return socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        raise


def _host_of(descriptor: int, ports: Collection[int]) -> str:
    """The host at the other end of a connection to one of the ports; empty if it is none."""
    with suppress(OSError), duplicate(descriptor) as connection:
        return peer_host(connection, ports)
    return ""


def _shut_down(descriptor: int, expected: str, ports: Collection[int]) -> bool:
    """Shuts a connection down, which gRPC then closes. Returns whether it was one of that host.

    The descriptor may belong to another socket already.
    """
    with suppress(OSError), duplicate(descriptor) as connection:
        if peer_host(connection, ports) == expected:
            connection.shutdown(socket.SHUT_RDWR)
            return True
    return False


def peer_host(connection: socket.socket, ports: Collection[int]) -> str:
    """Raises OSError if the socket is not connected."""
    is_ip = connection.family in (socket.AF_INET, socket.AF_INET6)
    if not is_ip or connection.getsockname()[1] not in ports:
        return ""
    return host(connection.getpeername()[0])
