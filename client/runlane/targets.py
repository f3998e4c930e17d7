"""Classifies gRPC targets: does traffic to a target stay on this machine?"""

from __future__ import annotations

import ipaddress
import re

_UNIX_SCHEMES = ("unix:", "unix-abstract:")
_HOST_PORT = re.compile(r"(?P<host>\[[^\[\]]+\]|[^\[\]:]*):[\w-]+")


def is_local(target: str) -> bool:
    """Returns True if a gRPC target is certainly on this machine.

    True for a Unix socket, `localhost` and loopback addresses. Any other name may resolve to
    another machine at any time, so the result is False.
    """
    if target.startswith(_UNIX_SCHEMES):
        return True
    if target.startswith("dns:"):
        target = target.removeprefix("dns:")
        if target.startswith("//"):
            # dns://SERVER/HOST:PORT asks that DNS server.
            server, _, target = target.removeprefix("//").partition("/")
            if server:
                return False
    for scheme in ("ipv4:", "ipv6:"):
        if target.startswith(scheme):
            addresses = target.removeprefix(scheme).split(",")
            return all(map(_is_loopback, addresses))
    return _is_loopback(target)


def _is_loopback(address: str) -> bool:
    """Returns True if `HOST:PORT` or `HOST` is a loopback address."""
    match = _HOST_PORT.fullmatch(address)
    host = (match["host"] if match else address).strip("[]")
    if host.lower() == "localhost":
        return True
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)
    return (mapped or ip).is_loopback
