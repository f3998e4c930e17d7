"""Addresses to listen on, as options name them."""

from __future__ import annotations

import ipaddress
import re

import click


class ListenType(click.ParamType[tuple[str, int]]):
    """An address to listen on: HOST:PORT or PORT."""

    name = "address"

    def convert(
        self,
        value: str | tuple[str, int],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[str, int]:
        """Returns host and port."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(?:\[?(?P<host>[^\s\[\]]*?)\]?:)?(?P<port>\d{1,5})", value)
        if match is None or int(match["port"]) > 65535:
            self.fail(f"{value!r} is not HOST:PORT", param, ctx)
        return match["host"] or "127.0.0.1", int(match["port"])


def is_loopback(host: str) -> bool:
    """Returns True if only this machine reaches a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
