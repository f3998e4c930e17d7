"""Types of the values of options: durations, sizes, addresses, URLs, variables of programs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from ipaddress import ip_network
from typing import Any

import click
from click.core import ParameterSource

from runlane_server.agents.acp.policy import parse_policy
from runlane_server.agents.command.environment import has_secret, parse_variables
from runlane_server.agents.declaration import split_agent, split_slots
from runlane_server.net.addresses import Address

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>ms|s|m|h|d)")

_SIZE_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE = re.compile(r"(?P<number>\d+)(?P<unit>|KiB|MiB|GiB|TiB)")

_MAX_SIZE = (1 << 63) - 1
_MAX_DIGITS = 19

_CENTURY = 36_500 * 86_400.0
"""Seconds. Now plus a century is still a valid date."""

_HTTP_URL = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
"""No user and password: the URL is logged."""


def format_duration(seconds: float) -> str:
    """A text that `Duration` reads as that many seconds: `500ms`, `1.5s`, `30s`, `7d`, or `0`."""
    if not seconds:
        return "0"
    if seconds < 1:
        return f"{seconds * 1000:g}ms"
    for unit in ("d", "h", "m"):
        if seconds % _UNITS[unit] == 0:
            return f"{seconds / _UNITS[unit]:.0f}{unit}"
    return f"{seconds:.15g}s"


def format_size(count: int) -> str:
    """A text that `Size` reads as that many bytes: `512MiB`, `2GiB`, `1000`, or `0`."""
    for unit, factor in reversed(_SIZE_UNITS.items()):
        if unit and count and count % factor == 0:
            return f"{count // factor}{unit}"
    return str(count)


class Duration(click.ParamType[float]):
    """A duration with its unit: `500ms`, `30s`, `2m`, `12h`, `7d`; or `0`. Gives seconds."""

    name = "duration"

    def __init__(
        self, *, zero: bool = True, shortest: float = 0.0, longest: float = _CENTURY
    ) -> None:
        self._zero = zero
        self._shortest = shortest
        self._longest = longest

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The seconds. A float is in seconds already."""
        if isinstance(value, float):
            return value
        text = str(value)
        found = _DURATION.fullmatch(text)
        if found is None and text != "0":
            self.fail(f"{text!r} is not a duration such as 500ms, 30s, 2m or 7d", param, ctx)
        seconds = 0.0 if found is None else float(found["number"]) * _UNITS[found["unit"]]
        if not (seconds or self._zero):
            self.fail("must be greater than 0", param, ctx)
        if seconds < self._shortest:
            self.fail(f"must be at least {format_duration(self._shortest)}", param, ctx)
        if seconds > self._longest:
            self.fail(f"must be at most {format_duration(self._longest)}", param, ctx)
        return seconds


class AddressType(click.ParamType[Address]):
    """An address: `HOST:PORT` or, with `unix`, `unix:PATH`.

    With a `default_host` a port alone is enough.
    """

    name = "address"

    def __init__(self, *, unix: bool = True, default_host: str = "") -> None:
        self._unix = unix
        self._default_host = default_host

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Address:
        """The address."""
        text = str(value)
        if self._default_host and text.isdecimal():
            text = f"{self._default_host}:{text}"
        try:
            address = Address.parse(text)
        except ValueError as error:
            self.fail(str(error) if self._unix else self._wrong_form(value), param, ctx)
        if address.is_unix and not self._unix:
            self.fail(self._wrong_form(value), param, ctx)
        return address

    def _wrong_form(self, value: Any) -> str:
        form = "[HOST:]PORT" if self._default_host else "HOST:PORT"
        return f"{str(value)!r} is not of the form {form}"


class NetworkType(click.ParamType[str]):
    """A network of IP addresses, such as `10.0.0.0/8`. Gives its text."""

    name = "network"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The network, in its usual form."""
        try:
            return str(ip_network(str(value)))
        except ValueError as error:
            self.fail(f"{str(value)!r} is not a network such as 10.0.0.0/8: {error}", param, ctx)


class Ratio(click.FloatRange):
    """A fraction from 0 to 1."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The fraction. NaN is refused here, as the range of click lets it pass."""
        ratio: float = super().convert(value, param, ctx)
        if math.isnan(ratio):
            self.fail(f"{value} is not a number", param, ctx)
        return ratio


class HttpUrl(click.ParamType[str]):
    """The URL of a service without a path: `http://HOST[:PORT]` or `https://HOST[:PORT]`."""

    name = "url"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The URL, without a slash at its end."""
        text = str(value).rstrip("/")
        if _HTTP_URL.fullmatch(text) is None:
            # The text is not repeated: it may contain a password.
            self.fail("is not of the form http://HOST:PORT", param, ctx)
        return text


class Size(click.ParamType[int]):
    """A number of bytes, with or without a unit: `65536`, `512MiB`, `2GiB`."""

    name = "size"

    def __init__(self, least: int = 0, most: int | None = None) -> None:
        self._least = least
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The bytes."""
        found = _SIZE.fullmatch(str(value))
        if found is None:
            self.fail(f"{str(value)!r} is not a size such as 65536, 512MiB or 2GiB", param, ctx)
        digits = found["number"].lstrip("0")
        # Python refuses to convert thousands of digits, with an error of its own.
        size = int(digits[: _MAX_DIGITS + 1] or "0") * _SIZE_UNITS[found["unit"]]
        if size > _MAX_SIZE:
            self.fail(f"{str(value)[:40]} is too large", param, ctx)
        if size < self._least:
            self.fail(f"{str(value)[:40]} is less than {self._least}", param, ctx)
        if self._most is not None and size > self._most:
            self.fail(f"{str(value)[:40]} is more than {self._most} bytes", param, ctx)
        return size


class Variables(click.ParamType[str]):
    """Variables of a program: names separated by commas, or one NAME=VALUE.

    An environment variable or a key of the TOML file may contain several, one per line. A secret is
    refused on the command line.
    """

    name = "variables"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, unchanged."""
        text = str(value)
        try:
            parse_variables(text)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if has_secret(text) and _is_on_command_line(param, ctx):
            name = text.partition("=")[0]
            self.fail(
                f"the value of {name} on the command line is visible to all users of this machine; "
                f"set {name} for the server and write --command-env {name}, or use "
                "--command-env-file",
                param,
                ctx,
            )
        return text

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        """The lines."""
        return rv.splitlines()


class AgentSpec(click.ParamType[str]):
    """An agent: a spec, or NAME=SPEC. An environment variable may contain several, one per line."""

    name = "agent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, unchanged."""
        try:
            split_agent(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return str(value)

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        """The lines."""
        return [line for line in rv.splitlines() if line.strip()]


class AgentSlots(click.ParamType[str]):
    """A limit of slots: NAME=N. An environment variable may contain several, one per line."""

    name = "slots"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, unchanged."""
        try:
            split_slots(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return str(value)

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        """The lines."""
        return [line for line in rv.splitlines() if line.strip()]


class Permissions(click.ParamType[str]):
    """Answers to agents that ask for permissions: `deny,read=allow`."""

    name = "permissions"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, unchanged."""
        try:
            parse_policy(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return str(value)


class StoreText(click.ParamType[str]):
    """The URL of a store. A password in it is refused on the command line, which every user of the
    machine can read."""

    name = "url"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, unchanged."""
        url = str(value)
        if has_password(url) and _is_on_command_line(param, ctx):
            self.fail(
                "a password on the command line is visible to all users of this machine; set "
                "RUNLANE_STORE, or 'store' in the --config file, or use a PostgreSQL passfile",
                param,
                ctx,
            )
        return url


def _is_on_command_line(param: click.Parameter | None, ctx: click.Context | None) -> bool:
    """Whether the value of an option comes from the command line, which every user can read."""
    if param is None or ctx is None:
        return False
    return ctx.get_parameter_source(param.name or "") is ParameterSource.COMMANDLINE


def has_password(url: str) -> bool:
    """Whether the URL of a store holds a password; True if in doubt."""
    scheme, _, rest = url.partition("://")
    if scheme not in {"postgres", "postgresql"}:
        return False
    place, _, query = rest.partition("?")
    user = place.rpartition("@")[0]
    _, colon, password = user.partition(":")
    return bool(colon and password) or "password" in query.lower()
