"""Whether what is sent to a target stays on this machine."""

from __future__ import annotations

import ipaddress
import re

_UNIX = ("unix:", "unix-abstract:")
_WITH_PORT = re.compile(r"(?P<host>\[[^\[\]]+\]|[^\[\]:]*):[\w-]+")


def is_local(target: str) -> bool:
    """Whether a gRPC target is on this machine for certain: a Unix socket, `localhost`, or an
    address of the loopback. Of any other name nobody knows where it leads tomorrow.
    """
    if target.startswith(_UNIX):
        return True
    if target.startswith("dns:"):
        target = target.removeprefix("dns:")
        if target.startswith("//"):
            # What stands there is the name server that is to be asked.
            server, _, target = target.removeprefix("//").partition("/")
            if server:
                return False
    for scheme in ("ipv4:", "ipv6:"):
        if target.startswith(scheme):
            # It may be a list.
            return all(_is_loopback(one) for one in target.removeprefix(scheme).split(","))
    return _is_loopback(target)


def _is_loopback(place: str) -> bool:
    """Whether `HOST:PORT`, or a host alone, is of the loopback."""
    found = _WITH_PORT.fullmatch(place)
    host = (found["host"] if found else place).strip("[]")
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
