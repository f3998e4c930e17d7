"""`runlane mcp`: an MCP server over stdio, through which an assistant drives a Runlane server."""

from __future__ import annotations

from functools import partial

import click

from runlane.cli.base import Failure, execute
from runlane.cli.command import Command
from runlane.cli.connection import Settings


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
@click.pass_obj
def mcp(settings: Settings, *, allow_answers: bool, max_text: int) -> None:
    """Serve MCP on stdin and stdout: tools that accept, follow, cancel and list runs.

    An assistant starts this command; the options before `mcp` name the server and the token, which
    the assistant never sees. Requires: pip install 'runlane[mcp]'.

    \b
    Example of the command in the configuration of an assistant:
      runlane --server runlane.example.org:443 --tls --token-file token mcp
    """
    try:
        from runlane.cli.mcp_server.server import serve  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "mcp":
            raise
        raise Failure("mcp is not installed; run: pip install 'runlane[mcp]'") from None
    execute(settings, partial(serve, allow_answers=allow_answers, max_text=max_text))
