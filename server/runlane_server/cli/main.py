"""The command `runlane-server`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

# The C core of gRPC writes its own messages to stderr, in its own format. It reads this variable
# once, when it is loaded. Errors that matter are also raised as exceptions.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import click
from click.core import ParameterSource

from runlane_server.agents.command.prctl import protect_memory
from runlane_server.cli import maintenance
from runlane_server.cli.grant_commands import grant
from runlane_server.cli.health import health
from runlane_server.cli.token_commands import token
from runlane_server.config import Config
from runlane_server.config.sample import sample
from runlane_server.config.settings import SETTINGS
from runlane_server.config.sources import collecting_server_options, problems_of, store_options
from runlane_server.core.errors import StartError
from runlane_server.process import config_check, processes
from runlane_server.process.app import run
from runlane_server.store.open import StoreUrl
from runlane_server.telemetry import logs

_SETTINGS = {
    "auto_envvar_prefix": "RUNLANE",
    "show_default": True,
    "help_option_names": ["-h", "--help"],
}


class _ServerCommand(click.Group):
    """Lists its options by topic in --help."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes a section for each topic, then the commands."""
        topics = {setting.name: setting.topic for setting in SETTINGS}
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                title = topics.get(param.name or "", "Options")
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)
        self.format_commands(ctx, formatter)


@click.group(
    "runlane-server",
    cls=_ServerCommand,
    invoke_without_command=True,
    subcommand_metavar="[COMMAND]",
    context_settings=_SETTINGS,
)
@collecting_server_options
@click.version_option(package_name="runlane")
@click.pass_context
def command(context: click.Context, /, **settings: Any) -> int:
    """Starts a Runlane server, which accepts agent runs, executes them and reports their ends.

    Every option is also an environment variable, such as RUNLANE_LISTEN for --listen, and a key of
    the --config file. The commands maintain tokens, grants and the database, also while a server
    runs; their options go after the name of the command.
    """
    invalid = problems_of(context)
    if context.invoked_subcommand == check_config.name:
        invalid.clear()  # The command reads the same sources, and reports everything.
    for problem in invalid:
        raise problem
    if context.invoked_subcommand is None:
        config = Config.from_options(**settings)
        return run(config) if config.processes == 1 else processes.run(config)
    _refuse_flags(context, context.invoked_subcommand)
    return 0


# The context settings are repeated because a command would inherit the prefix RUNLANE_BACKUP_.
@command.command("backup", context_settings=_SETTINGS)
@store_options
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.argument("path", type=click.Path(path_type=Path))
def backup(store: str, path: Path, *, force: bool) -> int:
    """Writes a copy of the database to PATH.

    The copy is consistent and verified. To restore it, start a server with the copy as its
    --store. Cursors from before the restore are refused.
    """
    click.echo(maintenance.backup(StoreUrl.parse(store), path, force=force))
    return 0


@command.command("check", context_settings=_SETTINGS)
@store_options
@click.option(
    "--repair", is_flag=True, help="Replace or remove the records that cannot be read first."
)
@click.option(
    "--backup",
    "copy",
    type=click.Path(path_type=Path),
    help="File for a copy of the database before the repair.",
)
@click.option("--no-backup", is_flag=True, help="Repair without a copy.")
def check(store: str, copy: Path | None, *, repair: bool, no_backup: bool) -> int:
    """Verifies the database: prints one line per problem, and exits with 1 if there is any.

    Of a PostgreSQL store it reads one snapshot, while nodes may work.

    With --repair, which needs the server to be stopped, a damaged message or event is replaced by
    the placeholder that callers already get for it, and a session with a damaged lane, run or
    prompt is removed. It prints one line per change, and then the check.
    """
    if repair != (copy is not None or no_backup) or (copy is not None and no_backup):
        raise click.UsageError(
            "--repair requires --backup FILE, or --no-backup if you have a backup;"
            " both require --repair"
        )
    url = StoreUrl.parse(store)
    if repair:
        logs.configure(level="warning")
    lines, code = maintenance.repair(url, copy) if repair else maintenance.check(url)
    for line in lines:
        click.echo(line)
    return code


@command.command("check-config", context_settings=_SETTINGS)
@collecting_server_options
@click.pass_context
def check_config(context: click.Context, /, **settings: Any) -> int:
    """Verifies the settings: prints one line per problem, and exits with 2 if there is any.

    It takes the options of a server, reads the same environment and file, and checks what they
    name: files, agent and installed extras. It does not listen and does not open the store. Invalid
    values are reported before anything that depends on them.
    """
    lines = [problem.format_message() for problem in problems_of(context)]
    lines = lines or [*config_check.problems_of(Config.from_options(**settings))]
    for line in lines or ["no problems"]:
        click.echo(" ".join(line.split()))
    return 2 if lines else 0


@command.command("sample-config")
def sample_config() -> int:
    """Prints a TOML file with every setting, its default and its meaning, as comments."""
    click.echo(sample(), nl=False)
    return 0


@command.command("renew", context_settings=_SETTINGS)
@store_options
def renew(store: str) -> int:
    """Gives a restored PostgreSQL database a new id, before servers use it.

    The same is needed for a standby that took over while it lagged behind. Cursors from before are
    refused from then on. Without a new id they would point at other events.
    """
    click.echo(maintenance.renew(StoreUrl.parse(store)))
    return 0


@command.command("rotate-node-key", context_settings=_SETTINGS)
@store_options
def rotate_node_key(store: str) -> int:
    """Gives the nodes of a PostgreSQL store a new key for their calls, while they run.

    The key before it stays valid until the next rotation. Rotate twice, a minute apart, to
    invalidate a key that leaked.
    """
    click.echo(maintenance.rotate_node_key(StoreUrl.parse(store)))
    return 0


command.add_command(token)
command.add_command(grant)
command.add_command(health)


def _refuse_flags(context: click.Context, name: str) -> None:
    """Refuses the server's flags before the name of a command, which would not see them."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is ParameterSource.COMMANDLINE:
            flag = parameter.opts[0]
            raise click.UsageError(f"{flag} must come after {name!r}", context)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; a failure to start is one line on stderr."""
    protect_memory()
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
    """Opens /dev/null in place of a standard stream that was closed before the start.

    Otherwise the next file or socket would get its number, and output for the stream would be
    written to it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _fail(message: str, code: int) -> NoReturn:
    line = " ".join(message.split())
    click.echo(f"runlane-server: error: {line}", err=True)
    sys.exit(code)
