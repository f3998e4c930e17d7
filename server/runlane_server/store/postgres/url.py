"""What the URL of a PostgreSQL store says: the database, and the schema the store has there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode, urlsplit

from runlane_server.core.errors import StartError

SCHEMA = "runlane"
"""Where the tables are unless the URL has `?schema=NAME`."""

# Its name is part of that of a channel, which has 63 characters at the most.
_SCHEMA = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,49}")


@dataclass(frozen=True, slots=True)
class Address:
    """A database and a schema in it. `label` is what may be shown: it has no user and no password.

    `dsn` may name several hosts, of which the primary one is used; `dsns` are those of one host
    each.
    """

    dsn: str
    schema: str
    label: str

    @property
    def dsns(self) -> tuple[str, ...]:
        """The same database at each of the hosts, in the order in which they are named."""
        parts = urlsplit(self.dsn)
        user, at, hosts = parts.netloc.rpartition("@")
        if hosts:
            return tuple(
                parts._replace(netloc=user + at + one).geturl() for one in hosts.split(",")
            )
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        places = options.get("host", "").split(",")
        ports = options.get("port", "").split(",")
        if len(ports) == 1:
            ports *= len(places)
        if len(ports) != len(places):
            return (self.dsn,)  # which the driver refuses, and says why
        return tuple(
            parts._replace(query=urlencode(_at(options, place, port))).geturl()
            for place, port in zip(places, ports, strict=True)
        )

    @property
    def channel(self) -> str:
        """The channel that nodes of one schema wake each other by."""
        return f"runlane_{self.schema}"


def read_url(url: str) -> Address:
    """What the URL of a store names. Raises StartError."""
    try:
        url.encode()
        parts = urlsplit(url)
    except ValueError:
        # What is wrong with it is not told: it may hold a password.
        raise StartError("--store: is not a URL") from None
    options = parse_qsl(parts.query, keep_blank_values=True)
    schema = next((value for name, value in options if name == "schema"), SCHEMA)
    if not _SCHEMA.fullmatch(schema):
        raise StartError(
            f"--store: schema {schema!r} has to be of letters, digits and _, 50 at the most"
        )
    rest = [(name, value) for name, value in options if name != "schema"]
    dsn = parts._replace(query=urlencode(rest)).geturl()
    try:
        urlsplit(dsn)
    except ValueError:
        # A path that begins with // is a host once it is put together again.
        raise StartError("--store: is not a URL") from None
    hosts = parts.netloc.rpartition("@")[2] or dict(rest).get("host", "")
    return Address(dsn, schema, f"postgresql://{hosts}{parts.path} schema {schema}")


def _at(options: Mapping[str, str], place: str, port: str) -> dict[str, str]:
    """The options of a URL, for one of its hosts."""
    own = {"host": place, "port": port}
    return {name: own.get(name, value) for name, value in options.items()}
