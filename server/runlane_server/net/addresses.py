"""The addresses of a server: the one it listens on, and the one other nodes use."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runlane_server.core.errors import SettingsError

_TCP = re.compile(r"(\[(?P<ipv6>[^\[\]]+)\]|(?P<host>[^\[\]:]+)):(?P<port>\d{1,5})")

_UNIX = "unix:"

_LAST_PORT = 65535

_MAX_HOST = 253
"""Characters of the longest name in DNS (RFC 1035). The encoding below takes quadratic time."""

_DOCUMENTATION_HOSTS = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
"""Addresses for documentation (RFC 5737, RFC 3849). They have no route of their own, so the kernel
picks the default route, and with it the address that other hosts see."""


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a TCP port, or the path of a Unix socket.

    `host` is a name or an IP address, without brackets. Port 0 stands for any free port. With a
    `path`, host and port are empty.
    """

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address that `HOST:PORT` or `unix:PATH` names. Raises ValueError."""
        if text.startswith(_UNIX) and text != _UNIX:
            return cls(path=text.removeprefix(_UNIX))
        found = _TCP.fullmatch(text)
        if found is None or int(found["port"]) > _LAST_PORT:
            raise ValueError(f"{text!r} is not of the form HOST:PORT or unix:PATH")
        host = found["ipv6"] or found["host"]
        if not _is_host(host) or (found["ipv6"] and ":" not in host):
            raise ValueError(f"{text!r} does not name a host")
        return cls(host, int(found["port"]))

    def __str__(self) -> str:
        """The text that `parse` reads, which is also a target of gRPC."""
        if self.is_unix:
            return f"{_UNIX}{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_unix(self) -> bool:
        """Whether this is a Unix socket, which has no port."""
        return bool(self.path)

    def with_port(self, port: int) -> Address:
        """The same host at another port, from 0 to 65535. Raises ValueError."""
        if not 0 <= port <= _LAST_PORT:
            raise ValueError(f"{self.host}: there is no port {port}")
        return replace(self, port=port)

    def resolve(self) -> list[tuple[socket.AddressFamily, Any]]:
        """The socket addresses to bind, each with its family. Raises OSError."""
        if self.is_unix:
            return [(socket.AF_UNIX, self.path)]
        found = socket.getaddrinfo(
            self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        return [(family, place) for family, _, _, _, place in found]


def advertised_address(bound: Address, node_address: Address | None) -> Address:
    """The address at which other nodes reach this one: `node_address` if it is set, else `bound`.

    Port 0 of `node_address` stands for the bound port. A wildcard host becomes the address of this
    host. Raises StartError if no port is known.
    """
    if node_address is not None:
        if node_address.port:
            return node_address
        if bound.is_unix:
            raise SettingsError(f"--node-address {node_address}: {bound} has no port; set one")
        return node_address.with_port(bound.port)
    if bound.is_unix:
        # gRPC names the file by its absolute path, with links unresolved.
        return Address(path=str(Path(bound.path).absolute()))
    return Address(_own_host(), bound.port) if _is_wildcard(bound.host) else bound


def _is_host(host: str) -> bool:
    """Whether a lookup accepts the name; it raises UnicodeError for others, such as `a..b`."""
    try:
        return len(host) <= _MAX_HOST and bool(host.encode("idna"))
    except UnicodeError:
        return False


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _own_host() -> str:
    """The IP address that other hosts see, or the name of this host if it has no network.

    The IP address comes first because not every other host can resolve the name.
    """
    for family, destination in _DOCUMENTATION_HOSTS:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((destination, 9))  # sends nothing: a datagram socket picks its route
                host: str = probe.getsockname()[0]
        except OSError:
            continue
        return host
    return socket.gethostname()
