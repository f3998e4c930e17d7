"""The root command, with the global options."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from runlane.cli import queue_edits  # noqa: F401 - adds its commands to `queue`
from runlane.cli.agents import agents
from runlane.cli.answer import answer
from runlane.cli.cancel import cancel
from runlane.cli.chat.command import chat
from runlane.cli.command import Group
from runlane.cli.connection import Settings, options
from runlane.cli.follow import follow
from runlane.cli.fork import fork
from runlane.cli.lists import runs, wait
from runlane.cli.mcp import mcp
from runlane.cli.queue import queue, status
from runlane.cli.run import run
from runlane.cli.sessions import messages, sessions
from runlane.cli.show import show
from runlane.cli.top import top
from runlane.cli.watch import watch
from runlane.cli.webhooks import webhooks
from runlane.cli.worker import worker


def _version() -> str:
    try:
        return version("runlane")
    except PackageNotFoundError:
        return "unknown (not installed as a package)"


@click.group(
    cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@options
@click.version_option(_version(), prog_name="runlane")
@click.pass_context
def runlane(context: click.Context, /, **settings: Any) -> None:
    """Submit prompts to agents, and follow, cancel and list their runs.

    A run belongs to a session; the runs of a session execute one at a time. On a terminal, the
    output is formatted for people. In a pipe, it is one tab-separated line per record. With --json,
    it is one JSON object per line.

    \b
    Exit codes:
      0    success; for `run` and `wait`: the run completed
      1    error; for `run` and `wait`: the run failed
      2    usage error, or an argument was rejected by the server
      130  interrupted; for `run` and `wait`: the run was cancelled
    """
    context.obj = Settings(**settings)


for command in (
    *(run, chat, cancel, watch, follow, top, runs, queue, show, wait, answer, sessions, messages),
    *(agents, fork, status, webhooks, worker, mcp),
):
    runlane.add_command(command)
