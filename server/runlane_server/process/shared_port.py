"""Reserves a port for the processes of one server.

SO_REUSEPORT shares a port with every process of the same user that binds with it. To keep two
servers from sharing one by mistake, the parent first binds the port as if it were not shared.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from runlane_server.core.errors import SettingsError, start_error
from runlane_server.net.addresses import Address


@contextmanager
def reserved_port(address: Address) -> Iterator[Address]:
    """Reserves an address; inside, processes of this user can listen there with SO_REUSEPORT.

    Yields the address with the port that was bound. Raises StartError, also if another server
    listens there with SO_REUSEPORT.
    """
    if address.is_unix:
        raise SettingsError(f"cannot listen on {address}: it cannot be shared")
    with ExitStack() as reservations:
        try:
            port = address.port
            for family, (host, *_) in address.resolve():
                # All IP addresses of a name such as `localhost` get the same port.
                reservation = reservations.enter_context(_reserve(family, host, port))
                port = reservation.getsockname()[1]
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise start_error(f"cannot listen on {address}: {why}", error) from error
        yield address.with_port(port)


def _reserve(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    """A socket that is bound, does not listen, and admits only sockets with SO_REUSEPORT."""
    with socket.socket(family, socket.SOCK_STREAM) as exclusive:
        # Lingering connections of a previous server do not count.
        exclusive.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        exclusive.bind((host, port))
        # Of two sockets that have bound, only one can listen: this call fails in the slower server.
        exclusive.listen()
        # The reservation is bound before this socket closes, so the port is never free in between.
        exclusive.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reservation = socket.socket(family, socket.SOCK_STREAM)
        try:
            reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            reservation.bind(exclusive.getsockname())
            # It does not listen: with SO_REUSEADDR still on, others could bind and listen there.
            reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        except OSError:
            reservation.close()
            raise
    return reservation
