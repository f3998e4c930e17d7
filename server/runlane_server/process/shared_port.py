"""A port for the processes of one server, and for nobody else.

Whoever binds with SO_REUSEPORT shares a port with all others of the same user who do. So that two
servers never share one by mistake, a port is taken first as if it was not to be shared.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from runlane_server.core.errors import StartError
from runlane_server.net.addresses import split_address


@contextmanager
def held(address: str) -> Iterator[str]:
    """Holds HOST:PORT; in it, processes of this user can listen there with SO_REUSEPORT.

    Gives the address with the port that was bound. Raises StartError, also if anybody listens
    there who would share it.
    """
    host, port = split_address(address)
    if port is None:
        raise StartError(f"cannot listen on {address}: it cannot be shared")
    with ExitStack() as holding:
        try:
            for family, place in _places(host):
                # What `localhost` stands for has one port.
                holder = holding.enter_context(_held(family, place, port))
                port = holder.getsockname()[1]
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise StartError(f"cannot listen on {address}: {why}") from error
        yield f"{host}:{port}"


def _places(host: str) -> list[tuple[socket.AddressFamily, str]]:
    found = socket.getaddrinfo(
        host.strip("[]"), 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    return [(family, str(place[0])) for family, _, _, _, place in found]


def _held(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    """A socket that has a place, and neither listens nor lets anybody in who does not share."""
    with socket.socket(family, socket.SOCK_STREAM) as first:
        # Connections of a server that was here before do not matter; SO_REUSEADDR says so.
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        first.bind((host, port))
        # Of two who have bound only one can listen: it is this that fails if somebody was quicker.
        first.listen()
        # Opened for sharing under way, so that at no instant nobody has the place.
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder = socket.socket(family, socket.SOCK_STREAM)
        try:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            holder.bind(first.getsockname())
            # It does not listen: with SO_REUSEADDR on, others could bind its place and listen.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        except OSError:
            holder.close()
            raise
    return holder
