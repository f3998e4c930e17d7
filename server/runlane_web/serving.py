"""Runs a gateway with uvicorn."""

from __future__ import annotations

import errno
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import uvicorn

from runlane_web.connections import Connections, bounded_protocol
from runlane_web.gateway import Gateway

MAX_HEAD = 64 << 10
"""Maximum size in bytes of the first line and the headers of a request."""

GRACE = 5
"""Seconds that open requests get when the gateway stops. Streams resume elsewhere."""


@dataclass(frozen=True, slots=True)
class Address:
    """The address of a gateway: a TCP address or a Unix socket."""

    host: str = "127.0.0.1"
    port: int = 8080
    tls_cert: str | None = None
    tls_key: str | None = None

    @property
    def url(self) -> str:
        """The address for a browser."""
        scheme = "https" if self.tls_cert else "http"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}"


def new_token() -> str:
    """Makes a token that nobody can guess."""
    return secrets.token_urlsafe(32)


def bind(address: Address) -> list[socket.socket]:
    """Listens at all IP addresses of a host, of which a browser may try any. Raises OSError."""
    found = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    sockets: list[socket.socket] = []
    port, missing = address.port, OSError(errno.EADDRNOTAVAIL, "it has no IP address")
    try:
        for family, _, _, _, (host, *_rest) in found:
            sockets.append(socket.socket(family, socket.SOCK_STREAM))
            try:
                _listen(sockets[-1], str(host), port)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                sockets.pop().close()  # a machine without IPv6 resolves names to it all the same
                missing = error
                continue
            port = sockets[-1].getsockname()[1]
        if not sockets:
            raise missing
    except BaseException:
        for each in sockets:
            each.close()
        raise
    return sockets


def _listen(listening: socket.socket, host: str, port: int) -> None:
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if listening.family == socket.AF_INET6:
        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
    listening.bind((host, port))
    listening.listen(1024)


def make_server(gateway: Gateway, address: Address) -> uvicorn.Server:
    """Makes the server of a gateway, with the limits of connections and of what they send first."""
    config = uvicorn.Config(
        gateway,
        http=bounded_protocol(Connections()),
        ws="none",
        loop="auto",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEAD,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=GRACE,
        ssl_certfile=address.tls_cert,
        ssl_keyfile=address.tls_key,
    )
    return uvicorn.Server(config)


def serve(
    gateway: Gateway,
    address: Address,
    ready: Callable[[Address], None],
    descriptors: Sequence[int] = (),
) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        gateway: The application.
        address: The address to listen on; port 0 takes a free one.
        ready: Called with the address, once it is bound.
        descriptors: Sockets that already listen on the address, for the process that started this
            one; none: they are made.

    Raises:
        OSError: The address cannot be bound.
    """
    sockets = [socket.socket(fileno=each) for each in descriptors] or bind(address)
    ready(replace(address, port=sockets[0].getsockname()[1]))
    make_server(gateway, address).run(sockets=sockets)
