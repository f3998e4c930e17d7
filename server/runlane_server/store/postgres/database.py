"""The PostgreSQL database that a store URL names, and the schema of the store in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlencode, urlsplit

from runlane_server.core.errors import SettingsError

SCHEMA = "runlane"
"""The schema of the tables, unless the URL has `?schema=NAME`."""

# The schema is part of the channel's name, and PostgreSQL limits a name to 63 characters.
_SCHEMA = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,49}")


@dataclass(frozen=True, slots=True)
class Database:
    """A PostgreSQL database and a schema in it.

    `dsn` may name several hosts; the store uses the one that is the primary. It may hold a
    password. `label` has neither user nor password, and may appear in logs and errors.
    """

    dsn: str = field(repr=False)
    schema: str
    label: str

    @classmethod
    def parse(cls, url: str) -> Database:
        """Parses the URL of a store. Raises SettingsError; its text never repeats the URL, which
        may hold a password."""
        try:
            url.encode()
            parts = urlsplit(url)
        except ValueError:
            raise _malformed() from None
        options = parse_qsl(parts.query, keep_blank_values=True)
        schema = next((value for name, value in options if name == "schema"), SCHEMA)
        if not _SCHEMA.fullmatch(schema):
            raise SettingsError(
                f"--store: schema {schema!r} is not valid; use 1 to 50 ASCII letters, digits and"
                " underscores, and no digit first"
            )
        rest = [(name, value) for name, value in options if name != "schema"]
        dsn = parts._replace(query=urlencode(rest)).geturl()
        try:
            urlsplit(dsn)
        except ValueError:
            # A path that begins with // becomes a host when the URL is put together again.
            raise _malformed() from None
        hosts = parts.netloc.rpartition("@")[2] or dict(rest).get("host", "")
        return cls(dsn, schema, f"postgresql://{hosts}{parts.path} schema {schema}")

    @property
    def dsns(self) -> tuple[str, ...]:
        """The same database at each of its hosts, in the order of the URL."""
        parts = urlsplit(self.dsn)
        user, at, hosts = parts.netloc.rpartition("@")
        if hosts:
            return tuple(
                parts._replace(netloc=user + at + one).geturl() for one in hosts.split(",")
            )
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        names = options.get("host", "").split(",")
        ports = options.get("port", "").split(",")
        if len(ports) == 1:
            ports *= len(names)
        if len(ports) != len(names):
            return (self.dsn,)  # the driver refuses it and says why
        return tuple(
            parts._replace(query=urlencode(_at(options, name, port))).geturl()
            for name, port in zip(names, ports, strict=True)
        )

    @property
    def channel(self) -> str:
        """The notification channel by which the nodes of one schema wake each other."""
        return f"runlane_{self.schema}"


def _malformed() -> SettingsError:
    return SettingsError("--store: the value is not a valid URL")


def _at(options: Mapping[str, str], host: str, port: str) -> dict[str, str]:
    """The options of a URL, for one of its hosts."""
    own = {"host": host, "port": port}
    return {name: own.get(name, value) for name, value in options.items()}
