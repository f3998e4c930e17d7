"""The command `runlane-server`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

# grpc's C core writes to stderr by itself, in a form of its own. It reads this once, when it is
# loaded; what matters is raised as an exception too.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import click

from runlane_server.app import run
from runlane_server.config import Config, options
from runlane_server.core.errors import StartError


@click.command(
    "runlane-server", context_settings={"auto_envvar_prefix": "RUNLANE", "show_default": True}
)
@options
@click.version_option(package_name="runlane")
def command(**settings: Any) -> int:
    """Serves Runlane: accepts agent runs, runs them, and tells how they ended.

    Every option can be given as an environment variable too: RUNLANE_LISTEN for --listen.
    """
    return run(Config.of(**settings))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; why it cannot start is one line on stderr."""
    try:
        code = command.main(arguments, standalone_mode=False)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except StartError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted before it could serve", 130)
    sys.exit(code)


def _fail(message: str, code: int) -> NoReturn:
    line = " ".join(message.split())
    click.echo(f"runlane-server: error: {line}", err=True)
    sys.exit(code)
