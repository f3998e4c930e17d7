"""`runlane mcp`: an MCP server, through which an assistant drives a Runlane server."""

from __future__ import annotations

import asyncio
import re
from functools import partial
from pathlib import Path
from typing import Any

import click

from runlane.cli.base import Failure, InvalidUsage, execute
from runlane.cli.command import Command
from runlane.cli.connection import Settings, read_token

_ORIGIN = re.compile(r"https?://[^/\s?#]+")
_ADDRESS = re.compile(r"(127\.0\.0\.1|localhost|\[::1\]):(\d{1,5})")
_OF_HTTP = ("own_token_file", "allowed_host", "allowed_origin")

MIN_TOKEN = 20
"""Minimum number of characters of a token of its own."""


@click.command(cls=Command)
@click.option(
    "--allow-answers",
    is_flag=True,
    help="Let the assistant answer the questions of agents, approvals included.",
)
@click.option(
    "--max-text",
    type=click.IntRange(min=1000),
    default=20_000,
    show_default=True,
    help="Maximum number of characters of one text in a result.",
)
@click.option(
    "--http",
    metavar="HOST:PORT",
    default="",
    help="Serve streamable HTTP at this address of this machine instead of stdin and stdout; port "
    "0 takes a free one and prints it. Each assistant sends its own token.",
)
@click.option(
    "--own-token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="With --http, for a server without access control: the token that assistants must send.",
)
@click.option(
    "--allowed-host",
    multiple=True,
    metavar="NAME",
    help="With --http: a name under which a proxy forwards requests. Repeatable.",
)
@click.option(
    "--allowed-origin",
    multiple=True,
    metavar="ORIGIN",
    help="With --http: an origin of web pages that may call, such as https://app.example.com. "
    "Repeatable.",
)
@click.pass_obj
def mcp(
    settings: Settings, /, *, allow_answers: bool, max_text: int, http: str, **door: Any
) -> None:
    """Serve MCP on stdin and stdout, or over HTTP: tools that accept, follow, cancel and list runs.

    An assistant starts this command; the options before `mcp` name the server and the token, which
    the assistant never sees. Requires: pip install 'runlane[mcp]'.

    \b
    Example of the command in the configuration of an assistant:
      runlane --server runlane.example.org:443 --tls --token-file token mcp
    """
    options: dict[str, Any] = {"allow_answers": allow_answers, "max_text": max_text}
    if http:
        _serve_http(settings, http, options, **door)
        return
    for name in _OF_HTTP:
        if door[name]:
            raise InvalidUsage(f"--{name.replace('_', '-')}: needs --http")
    try:
        from runlane.cli.mcp_server.server import serve  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        _report_missing(error)
        raise
    execute(settings, partial(serve, **options))


def _report_missing(error: ModuleNotFoundError) -> None:
    """Raises Failure if what is missing belongs to the extra."""
    if (error.name or "").partition(".")[0] in {"mcp", "starlette", "uvicorn"}:
        raise Failure("mcp is not installed; run: pip install 'runlane[mcp]'") from None


def _serve_http(
    settings: Settings,
    http: str,
    options: dict[str, Any],
    *,
    own_token_file: Path | None,
    allowed_host: tuple[str, ...],
    allowed_origin: tuple[str, ...],
) -> None:
    listen = _ADDRESS.fullmatch(http)
    if listen is None or int(listen[2]) > 65535:
        raise InvalidUsage(
            f"--http: {http!r} is not 127.0.0.1:PORT; tokens would travel unencrypted to other "
            "machines, so put a proxy with TLS before it and name its host with --allowed-host"
        )
    if settings.token or settings.token_file:
        raise InvalidUsage(
            "--http: each assistant sends its own token; remove --token-file and RUNLANE_TOKEN"
        )
    for origin in allowed_origin:
        if _ORIGIN.fullmatch(origin) is None:
            raise InvalidUsage(
                f"--allowed-origin: {origin!r} is not an origin such as https://app.example.com"
            )
    own_token = "" if own_token_file is None else _own_token(own_token_file)
    try:
        from runlane.cli.mcp_server.door import serve_http  # noqa: PLC0415 - an extra
        from runlane_web.guard import Policy, host_names  # noqa: PLC0415
        from runlane_web.serving import Address  # noqa: PLC0415
    except ModuleNotFoundError as error:
        _report_missing(error)
        raise
    address = Address(listen[1].strip("[]"), int(listen[2]))
    policy = Policy(host_names(address.host, allowed_host), frozenset(allowed_origin), own_token)
    try:
        asyncio.run(serve_http(settings, policy, address, **options))
    except OSError as error:
        raise Failure(f"--http: {address.url}: {error.strerror}") from None
    except KeyboardInterrupt:
        return


def _own_token(path: Path) -> str:
    token = read_token(path, "--own-token-file")
    if len(token) < MIN_TOKEN or re.fullmatch(r"[!-~]+", token) is None:
        raise InvalidUsage(
            f"--own-token-file: {path} must have {MIN_TOKEN} or more printable characters without "
            "spaces"
        )
    return token
