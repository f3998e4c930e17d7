"""How a setting is declared: as a field of `Config`, with its type, help text and topic.

The flag, the environment variable, the key of the TOML file and the line in docs/settings.md all
come from this one declaration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, TypeAlias, TypeVar

import click

from runlane_server.config.option_types import Duration, Size, format_duration, format_size

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator: TypeAlias = Callable[[Command], Command]
OptionKind: TypeAlias = type[click.Option]

_KEY = "runlane"
"""The key of the declaration in the metadata of a field."""


class Topic(StrEnum):
    """The topic of a setting. The value is a heading of --help and docs/settings.md."""

    LISTENING = "Listening"
    STORE = "Store"
    AGENTS = "Agents"
    PROGRAMS = "Programs"
    LIMITS = "Limits"
    ACCESS = "Access and TLS"
    WEBHOOKS = "Webhooks"
    OBSERVABILITY = "Observability"
    SHUTDOWN = "Shutdown and retention"
    CLUSTER = "Cluster"


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a server.

    `name` and `default` come from the field that declares it. A setting whose type is `click.BOOL`
    is a switch. `without` describes what applies as long as the setting has no value.
    """

    topic: Topic
    type: click.ParamType[Any]
    help: str
    metavar: str | None = None
    without: str | None = None
    repeatable: bool = False
    name: str = ""
    default: Any = None

    @property
    def flag(self) -> str:
        """`--max-active-runs`."""
        return f"--{self.key}"

    @property
    def variable(self) -> str:
        """`RUNLANE_MAX_ACTIVE_RUNS`."""
        return f"RUNLANE_{self.name.upper()}"

    @property
    def key(self) -> str:
        """`max-active-runs`, in the TOML file."""
        return self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        """Whether the flag has no value."""
        return self.type is click.BOOL

    @property
    def default_text(self) -> str | None:
        """The default as a flag would give it; None if there is none."""
        if self.default is None or self.is_switch or self.repeatable:
            return None
        if isinstance(self.type, Duration):
            return format_duration(self.default)
        if isinstance(self.type, Size):
            return format_size(self.default)
        return str(self.default)

    def option(self, kind: OptionKind = click.Option) -> Decorator[Command]:
        """The option of the command line."""
        if self.is_switch:
            return click.option(self.flag, cls=kind, is_flag=True, help=self.help)
        return click.option(
            self.flag,
            cls=kind,
            type=self.type,
            default=self.default_text,
            multiple=self.repeatable,
            metavar=self.metavar,
            help=self.help,
            show_default=self.without,
        )

    def from_toml(self, value: object) -> object:
        """A value of the TOML file as `option` takes it. Raises TypeError."""
        if self.is_switch:
            if not isinstance(value, bool):
                raise TypeError("must be true or false")
            return value
        if self.repeatable and isinstance(value, list | dict):
            return _several(value)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise TypeError("must be a string or a number")
        if self.repeatable:
            return str(value).splitlines()
        # A flag gives 0.5 as a text, too. As a float it would be a duration without its unit.
        return str(value) if isinstance(value, float) else value

    def from_json(self, value: Any) -> Any:
        """A value that was written as JSON, back in its own type."""
        if value is None or self.is_switch:
            return value
        if self.repeatable:
            return tuple(self.type.convert(one, None, None) for one in value)
        return self.type.convert(value, None, None)


def _several(value: list[object] | dict[str, object]) -> list[str]:
    """The values of a repeatable setting that the TOML file gives as a list of strings, or as a
    table, where `name = value` stands for `NAME=VALUE`. Raises TypeError."""
    named = [(f"{key}=", one) for key, one in value.items()] if isinstance(value, dict) else []
    found = named or [("", one) for one in value]
    if any(isinstance(one, bool) or not isinstance(one, str | int) for _, one in found):
        raise TypeError("must be a string, a list of strings or a table of strings")
    return [f"{name}{one}" for name, one in found]


def setting(
    default: Any,
    topic: Topic,
    type: click.ParamType[Any],  # noqa: A002 - it is called so everywhere
    help: str,  # noqa: A002
    *,
    metavar: str | None = None,
    without: str | None = None,
    repeatable: bool = False,
) -> Any:
    """Declares a field of a record as a setting."""
    declared = Setting(topic, type, help, metavar, without, repeatable)
    return field(default=default, metadata={_KEY: declared})


def settings_of(record: type[Any], **declared: Setting) -> Any:
    """Declares a field that holds a record of its own, each of whose fields is a setting.

    Names and defaults are those of the record.
    """
    return field(default_factory=record, metadata={_KEY: (record, declared)})


def declared_settings(record: type[Any]) -> Iterator[Setting]:
    """The settings that the fields of a record declare, in order."""
    for each in fields(record):
        match each.metadata[_KEY]:
            case Setting() as declared:
                yield _named(each.name, each.default, declared)
            case inner, settings:
                for part in fields(inner):
                    yield _named(part.name, part.default, settings[part.name])


def _named(name: str, default: object, declared: Setting) -> Setting:
    assert default is not MISSING, name  # noqa: S101 - a mistake in a declaration
    return replace(declared, name=name, default=default)
