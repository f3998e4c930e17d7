"""The allowed destinations of deliveries: the form of a URL, and the addresses of its name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TypeAlias
from urllib.parse import urlsplit

import structlog

log = structlog.get_logger()

Network: TypeAlias = IPv4Network | IPv6Network

MAX_URL_BYTES = 2048

# Printable ASCII only: nothing of a URL can end the line of a header.
_URL = re.compile(r"https?://[!-~]+", re.IGNORECASE)
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}")

_GLOBAL6 = IPv6Network("2000::/3")
_NOT_GLOBAL6 = tuple(
    # Protocol assignments and Teredo, documentation, 6to4, documentation.
    IPv6Network(text)
    for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
)


HOST_REFUSED = "the host cannot be resolved, or deliveries to one of its addresses are not allowed"


class Refused(Exception):
    """The destination is not allowed. The text is for the owner of the webhook."""


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed URL. `path` includes the query."""

    is_https: bool
    host: str
    port: int
    path: str
    authority: str

    @classmethod
    def parse(cls, url: str) -> Target:
        """Parses a URL. Raises ValueError with the problem."""
        if len(url) > MAX_URL_BYTES:
            raise ValueError(f"has more than {MAX_URL_BYTES} characters")
        if not _URL.fullmatch(url):
            raise ValueError("is not an http or https URL of printable ASCII characters")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ValueError("has an invalid host or port") from error
        if "@" in parts.netloc:
            raise ValueError("has a user or a password; deliveries are signed instead")
        if parts.fragment or "#" in url:
            raise ValueError("has a fragment")
        if not parts.hostname or not _HOST.fullmatch(parts.hostname) or port == 0:
            raise ValueError("has an invalid host or port")
        is_https = parts.scheme.lower() == "https"
        query = f"?{parts.query}" if parts.query else ""
        return cls(
            is_https,
            parts.hostname,
            port or (443 if is_https else 80),
            (parts.path or "/") + query,
            parts.netloc,
        )


@dataclass(frozen=True, slots=True)
class Destinations:
    """The addresses to which deliveries may go: global ones, over https, and `allowed` networks."""

    allowed: Sequence[Network] = ()

    def check(self, address: str, *, is_https: bool) -> None:
        """Raises Refused if a delivery may not go to an address."""
        found = ip_address(address.partition("%")[0])
        if any(found.version == network.version and found in network for network in self.allowed):
            return
        if not _is_global(found):
            raise Refused(f"the address {found} is not a global one")
        if not is_https:
            raise Refused("http is allowed only to networks that the server's settings allow")

    def check_found(self, target: Target, addresses: Sequence[str]) -> None:
        """Raises Refused unless a delivery may go to all addresses of a host, one at least.

        If the host is a name, the text does not depend on what was found: it would show the
        owner of a webhook which names of a private network exist, and their addresses.
        """
        try:
            if not addresses:
                raise Refused("the name has no address")
            for address in addresses:
                self.check(address, is_https=target.is_https)
        except Refused as error:
            if _is_literal(target.host):
                raise
            log.info("webhook host refused", host=target.host, port=target.port, reason=str(error))
            raise Refused(HOST_REFUSED) from error

    def check_literal(self, target: Target) -> None:
        """Raises Refused if the host of a URL is an address that is not allowed."""
        if not _is_literal(target.host):
            if not target.is_https and not self.allowed:
                raise Refused("http is not allowed; use https")
            return
        self.check(target.host, is_https=target.is_https)


def _is_literal(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _is_global(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv4Address):
        return address.is_global and not (address.is_multicast or address.is_reserved)
    # Addresses that hold an IPv4 address (mapped, NAT64, 6to4, Teredo) are all outside of this.
    return address in _GLOBAL6 and not any(address in network for network in _NOT_GLOBAL6)
