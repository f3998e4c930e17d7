"""The sources of the values of settings: flags, environment variables and a TOML file.

The settings themselves are declared in `settings.py`. A flag overrides an environment variable,
which overrides the file, which overrides the default.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path

import click
from click.core import ParameterSource

from runlane_server.config.declaration import Command, Decorator
from runlane_server.config.settings import RENAMED, SETTINGS

_BY_NAME = {setting.name: setting for setting in SETTINGS}


def server_options(command: Command) -> Command:
    """Adds the options of all settings; their values are the arguments of `Config.from_options`."""
    current: list[Decorator[Command]] = [setting.option() for setting in SETTINGS]
    former: list[Decorator[Command]] = [_renamed_option(name) for name in RENAMED]
    return _add(command, [_file_option(), *current, *former])


def store_options(command: Command) -> Command:
    """Adds what names the store of a server: the keyword argument `store`."""
    return _add(command, [_file_option(), _BY_NAME["store"].option()])


def access_options(command: Command) -> Command:
    """Adds what names the access file of a server: the keyword argument `access`."""
    return _add(command, [_file_option(), _BY_NAME["access"].option()])


def _add(command: Command, options: Iterable[Decorator[Command]]) -> Command:
    for option in reversed([*options]):
        command = option(command)
    return command


def _file_option() -> Decorator[Command]:
    return click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=_read_file,
        metavar="FILE",
        help="TOML file with any of the server's settings, named as the flags are.",
    )


def _read_file(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    """Makes the settings of the file the defaults of the command."""
    if value is None:
        return
    try:
        content = tomllib.loads(value.read_text(encoding="utf-8"))
    except OSError as error:
        raise click.BadParameter(f"{value}: {error.strerror}", ctx, param) from error
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{value}: {error}", ctx, param) from error
    defaults: dict[str, object] = {}
    for key, given in content.items():
        name = key.replace("-", "_")
        if name in RENAMED:
            raise click.BadParameter(f"{value}: {key!r} is now {RENAMED[name]!r}", ctx, param)
        if name not in _BY_NAME:
            raise click.BadParameter(f"{value}: there is no setting {key!r}", ctx, param)
        try:
            defaults[name] = _BY_NAME[name].from_toml(given)
        except TypeError as error:
            raise click.BadParameter(f"{value}: {key!r} {error}", ctx, param) from error
    ctx.default_map = defaults


def _renamed_option(former: str) -> Decorator[Command]:
    """An option that only says what a setting is called now."""
    setting = _BY_NAME[RENAMED[former]]

    def refuse(ctx: click.Context, param: click.Parameter, value: object) -> None:
        if value is None:
            return
        if ctx.get_parameter_source(former) is ParameterSource.ENVIRONMENT:
            raise click.UsageError(f"RUNLANE_{former.upper()} is now {setting.variable}", ctx)
        raise click.UsageError(f"{param.opts[0]} is now {setting.flag}", ctx)

    flag = f"--{former.replace('_', '-')}"
    return click.option(flag, hidden=True, expose_value=False, callback=refuse)
