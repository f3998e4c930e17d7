"""The sources of the values of settings: flags, environment variables and a TOML file.

The settings themselves are declared in `settings.py`. A flag overrides an environment variable,
which overrides the file, which overrides the default.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from runlane_server.config.declaration import Command, Decorator
from runlane_server.config.settings import RENAMED, SETTINGS

_BY_NAME = {setting.name: setting for setting in SETTINGS}


_PROBLEMS = "runlane_server.problems"
"""The key of the collected problems in the metadata of a click context."""


class CollectingOption(click.Option):
    """Collects an invalid value in place of raising it. `problems_of` returns what it collected."""

    def handle_parse_result(
        self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]
    ) -> tuple[Any, list[str]]:
        """Leaves the parameter of an invalid value out."""
        problems = problems_of(ctx)
        try:
            return super().handle_parse_result(ctx, opts, args)
        except click.UsageError as error:
            problems.append(error)
            return None, args


def problems_of(ctx: click.Context) -> list[click.UsageError]:
    """The invalid values that the options of a command, or of the group it is in, collected."""
    found: list[click.UsageError] = ctx.meta.setdefault(_PROBLEMS, [])
    return found


def server_options(command: Command) -> Command:
    """Adds the options of all settings; their values are the arguments of `Config.from_options`."""
    return _server_options(command, click.Option)


def collecting_server_options(command: Command) -> Command:
    """Adds the same options, which collect what is invalid."""
    return _server_options(command, CollectingOption)


def _server_options(command: Command, kind: type[click.Option]) -> Command:
    current: list[Decorator[Command]] = [setting.option(kind) for setting in SETTINGS]
    former: list[Decorator[Command]] = [_renamed_option(name, kind) for name in RENAMED]
    return _add(command, [_file_option(kind), *current, *former])


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


def _file_option(kind: type[click.Option] = click.Option) -> Decorator[Command]:
    return click.option(
        "--config",
        cls=kind,
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
        try:
            defaults[name] = _default(name, key, given)
        except (LookupError, TypeError) as error:
            problem = click.BadParameter(f"{value}: {error.args[0]}", ctx, param)
            if not isinstance(param, CollectingOption):
                raise problem from error
            problems_of(ctx).append(problem)
    ctx.default_map = defaults


def _default(name: str, key: str, given: object) -> object:
    """A value of the file. Raises LookupError or TypeError with the reason."""
    if name in RENAMED:
        raise LookupError(f"{key!r} is now {RENAMED[name]!r}")
    if name not in _BY_NAME:
        raise LookupError(f"there is no setting {key!r}")
    try:
        return _BY_NAME[name].from_toml(given)
    except TypeError as error:
        raise TypeError(f"{key!r} {error}") from error


def _renamed_option(former: str, kind: type[click.Option]) -> Decorator[Command]:
    """An option that only says what a setting is called now."""
    setting = _BY_NAME[RENAMED[former]]

    def refuse(ctx: click.Context, param: click.Parameter, value: object) -> None:
        if value is None:
            return
        if ctx.get_parameter_source(former) is ParameterSource.ENVIRONMENT:
            raise click.UsageError(f"RUNLANE_{former.upper()} is now {setting.variable}", ctx)
        raise click.UsageError(f"{param.opts[0]} is now {setting.flag}", ctx)

    flag = f"--{former.replace('_', '-')}"
    return click.option(flag, cls=kind, hidden=True, expose_value=False, callback=refuse)
