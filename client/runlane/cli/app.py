"""The command's root: what all of its subcommands share."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from runlane.cli.cancel import cancel
from runlane.cli.connection import Settings, options
from runlane.cli.lists import runs, wait
from runlane.cli.run import run
from runlane.cli.sessions import messages, sessions
from runlane.cli.top import top
from runlane.cli.watch import watch


def _version() -> str:
    try:
        return version("runlane")
    except PackageNotFoundError:
        return "unknown (not installed as a package)"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@options
@click.version_option(_version(), prog_name="runlane")
@click.pass_context
def runlane(context: click.Context, /, **settings: Any) -> None:
    """Hands prompts to agent runs, cancels them, and tells how they end.

    A run belongs to a session, and the runs of a session go one at a time. On a terminal the output
    is for people; in a pipe it is plain text, one tab-separated line per record; with --json it is
    one JSON object per line.

    \b
    Exit codes:
      0    done; for `run` and `wait`: the run completed
      1    an error; for `run` and `wait`: the run failed
      2    bad usage, or the server found an argument invalid
      130  interrupted; for `run` and `wait`: the run was cancelled, by whomever
    """
    context.obj = Settings(**settings)


for command in (run, cancel, watch, top, runs, wait, sessions, messages):
    runlane.add_command(command)
