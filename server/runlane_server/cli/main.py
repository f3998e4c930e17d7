"""The command `runlane-server`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

# grpc's C core writes to stderr by itself, in a form of its own. It reads this once, when it is
# loaded; what matters is raised as an exception too.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import click
from click.core import ParameterSource

from runlane_server.cli import maintenance
from runlane_server.cli.token_commands import token
from runlane_server.config.settings import Config, options, store_options
from runlane_server.core.errors import StartError
from runlane_server.process import processes
from runlane_server.process.app import run
from runlane_server.store.open import StoreUrl

_SETTINGS = {"auto_envvar_prefix": "RUNLANE", "show_default": True}


@click.group(
    "runlane-server",
    invoke_without_command=True,
    subcommand_metavar="[COMMAND]",
    context_settings=_SETTINGS,
)
@options
@click.version_option(package_name="runlane")
@click.pass_context
def command(context: click.Context, /, **settings: Any) -> int:
    """Serves Runlane: accepts agent runs, runs them, and tells how they ended.

    Every option can be given as an environment variable too: RUNLANE_LISTEN for --listen. The
    commands look after the database of a server, also while it serves; each has options of its own.
    """
    if context.invoked_subcommand is None:
        config = Config.of(**settings)
        return run(config) if config.workers == 1 else processes.run(config)
    _refuse_flags(context, context.invoked_subcommand)
    return 0


# The settings are given again, as a command of a group would read RUNLANE_BACKUP_STORE.
@command.command("backup", context_settings=_SETTINGS)
@store_options
@click.option("--force", is_flag=True, help="Replace the file if it is there already.")
@click.argument("path", type=click.Path(path_type=Path))
def backup(store: str, path: Path, *, force: bool) -> int:
    """Writes a copy of the database to PATH.

    The copy is consistent and verified. To restore it, let a server use it, or a copy of it, as
    its --store; it takes no cursors from before.
    """
    click.echo(maintenance.backup(StoreUrl.parse(store), path, force=force))
    return 0


@command.command("check", context_settings=_SETTINGS)
@store_options
def check(store: str) -> int:
    """Verifies the database: prints what is wrong, a line each, and exits with 1 if anything is."""
    lines, code = maintenance.check(StoreUrl.parse(store))
    for line in lines:
        click.echo(line)
    return code


@command.command("renew", context_settings=_SETTINGS)
@store_options
def renew(store: str) -> int:
    """Gives a PostgreSQL database that was restored a new id, before servers use it.

    So it is for a standby that took over and lagged behind. Cursors from before are refused from
    then on; without this they would point at other events.
    """
    click.echo(maintenance.renew(StoreUrl.parse(store)))
    return 0


command.add_command(token)


def _refuse_flags(context: click.Context, name: str) -> None:
    """Refuses the server's flags before a command, which would not see them."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is ParameterSource.COMMANDLINE:
            flag = parameter.opts[0]
            raise click.UsageError(f"{flag}: is of the server; give it behind {name!r}", context)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; why it cannot start is one line on stderr."""
    _occupy_standard_streams()
    try:
        code = command.main(arguments, standalone_mode=False)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except StartError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    sys.exit(code)


def _occupy_standard_streams() -> None:
    """Puts nothing where a standard stream was closed before the start. The next file or socket
    would be in its place, and what is meant for the stream would be written to it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _fail(message: str, code: int) -> NoReturn:
    line = " ".join(message.split())
    click.echo(f"runlane-server: error: {line}", err=True)
    sys.exit(code)
