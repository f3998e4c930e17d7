"""What the values of options may be: times, sizes, addresses, variables of programs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import click

from runlane_server.agents.command.environment import parse_variables
from runlane_server.net.addresses import split_address

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>ms|s|m|h|d)")

_SIZE_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE = re.compile(r"(?P<number>\d+)(?P<unit>|KiB|MiB|GiB|TiB)")

_LARGEST = (1 << 63) - 1

_CENTURY = 36_500 * 86_400.0
"""Seconds; a time that is as far away is still a date."""

_HTTP_URL = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
"""Without a user: the log tells it."""


class Duration(click.ParamType[float]):
    """A length of time with its unit: `500ms`, `30s`, `2m`, `12h`, `7d`; or `0`."""

    name = "duration"

    def __init__(self, *, zero: bool = True, longest: float = _CENTURY) -> None:
        self._zero = zero
        self._longest = longest

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The seconds."""
        if isinstance(value, float):
            return value  # a default
        text = str(value)
        found = _DURATION.fullmatch(text)
        if found is None and text != "0":
            self.fail(f"{text!r} is not a duration such as 500ms, 30s, 2m or 7d", param, ctx)
        seconds = 0.0 if found is None else float(found["number"]) * _UNITS[found["unit"]]
        if not (seconds or self._zero):
            self.fail("has to be more than 0", param, ctx)
        if seconds > self._longest:
            most = f"{self._longest:g}s" if self._longest < _CENTURY else "36500d"
            self.fail(f"is at most {most}", param, ctx)
        return seconds


class Address(click.ParamType[str]):
    """Where to listen; without `unix` it is in a network. With a `host` a port will do."""

    name = "address"

    def __init__(self, *, unix: bool = True, host: str = "") -> None:
        self._unix = unix
        self._host = host

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The address as it was given, with its host."""
        if self._host and str(value).isdecimal():
            value = f"{self._host}:{value}"
        try:
            _, port = split_address(str(value))
        except ValueError as error:
            self.fail(str(error) if self._unix else self._form(value), param, ctx)
        if port is None and not self._unix:
            self.fail(self._form(value), param, ctx)
        return str(value)

    def _form(self, value: Any) -> str:
        return f"{str(value)!r} is not of the form {'[HOST:]PORT' if self._host else 'HOST:PORT'}"


class Ratio(click.FloatRange):
    """A share, from 0 to 1."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The share. What is no number lies in no range, which the range does not notice."""
        share: float = super().convert(value, param, ctx)
        if math.isnan(share):
            self.fail(f"{value} is not a number", param, ctx)
        return share


class HttpUrl(click.ParamType[str]):
    """Where a service is: `http://HOST[:PORT]` or `https://...`, without a path."""

    name = "url"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The URL as it was given, without a slash at its end."""
        text = str(value).rstrip("/")
        if _HTTP_URL.fullmatch(text) is None:
            # It may hold a password.
            self.fail("is not of the form http://HOST:PORT", param, ctx)
        return text


class Size(click.ParamType[int]):
    """A number of bytes, with or without a unit: `65536`, `512MiB`, `2GiB`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The bytes."""
        found = _SIZE.fullmatch(str(value))
        if found is None:
            self.fail(f"{str(value)!r} is not a size such as 65536, 512MiB or 2GiB", param, ctx)
        size = int(found["number"]) * _SIZE_UNITS[found["unit"]]
        if size > _LARGEST:
            self.fail(f"{value} is too large", param, ctx)
        return size


class Variables(click.ParamType[str]):
    """Variables of a program: names with commas between them, or one NAME=VALUE.

    In the environment and in a file there may be several, each in a line.
    """

    name = "variables"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text as it was given."""
        try:
            parse_variables(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return str(value)

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        """The lines."""
        return rv.splitlines()
