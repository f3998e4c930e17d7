"""Where the other nodes reach this one."""

from __future__ import annotations

import ipaddress
import os
import re
import socket

from runlane_server.core.errors import StartError

_HOST_AND_PORT = re.compile(r"(?P<host>\[[^\[\]]+\]|[^\[\]:]+):(?P<port>\d{1,5})")

_FAR_AWAY = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
"""Addresses for documentation (RFC 5737, RFC 3849): the way there is the way to everywhere."""


def split_address(address: str) -> tuple[str, int | None]:
    """Host and port of `HOST:PORT`, or path and None of `unix:PATH`. Raises ValueError."""
    if address.startswith("unix:") and address != "unix:":
        return address.removeprefix("unix:"), None
    found = _HOST_AND_PORT.fullmatch(address)
    if found is None or int(found["port"]) > 65535:
        raise ValueError(f"{address!r} is not of the form HOST:PORT or unix:PATH")
    return found["host"], int(found["port"])


def of_process(address: str | None, number: int, option: str = "--node-address") -> str | None:
    """What an address means for the process of that number: it has the port of the first one for
    number 1, and each has the next. Raises StartError if there is no such port."""
    if address is None:
        return None
    host, port = split_address(address)
    if not port:
        return address
    if port + number - 1 > 65535:
        raise StartError(f"{option} {address}: has no port for process {number}")
    return f"{host}:{port + number - 1}"


def own_listen(listen: str, node_address: str | None) -> str:
    """Where a process listens alone: on the host of the shared address, at the port of its
    `--node-address`, or a free one."""
    host, _ = split_address(listen)
    _, port = split_address(node_address) if node_address else (None, 0)
    return f"{host}:{port}"


def reached_at(bound: str, node_address: str | None) -> str:
    """The address for the others: the one that is given, else the one that is bound.

    Port 0 stands for the one that is bound. Raises StartError where there is none.
    """
    host, port = split_address(bound)
    if node_address is not None:
        outer_host, outer_port = split_address(node_address)
        if not (outer_port or port):
            raise StartError(f"--node-address {node_address}: {bound} has no port; give one")
        return f"{outer_host}:{outer_port or port}"
    if port is None:
        return f"unix:{os.path.abspath(host)}"  # noqa: PTH100 - gRPC names no links
    return f"{_this_host() if _is_wildcard(host) else host}:{port}"


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return False


def _this_host() -> str:
    """The address of this host towards the others; its name, if it is in no network.

    The address comes first: not every host is known to the others by its name.
    """
    for family, place in _FAR_AWAY:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((place, 9))  # sends nothing, and finds the way
                host: str = probe.getsockname()[0]
        except OSError:
            continue
        return host if family == socket.AF_INET else f"[{host}]"
    return socket.gethostname()
