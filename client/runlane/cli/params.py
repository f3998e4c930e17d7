"""Parameters of several subcommands: pairs of flags, durations, attachments and the length of a
listing."""

from __future__ import annotations

import mimetypes
import os
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from runlane.types import Attachment

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PIECE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)(ms|s|m|h|d)")


class Switch(click.Option):
    """A pair of flags such as `--yes/--no`, which refuses both together; click takes the last."""

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Collects the flags that were given."""
        for names, value in ((self.opts, True), (self.secondary_opts, False)):
            parser.add_option(self, names, self.name, action="append_const", const=value)

    def consume_value(
        self, ctx: click.Context, opts: Mapping[str, Any]
    ) -> tuple[Any, ParameterSource]:
        """Returns the value. Raises UsageError for both flags."""
        given = opts.get(self.name or "")
        if isinstance(given, list):
            if len(set(given)) > 1:
                one, other = self.opts[0], self.secondary_opts[0]
                raise click.UsageError(f"{one} and {other} exclude each other", ctx)
            opts = {**opts, self.name or "": given[0]}
        return super().consume_value(ctx, opts)


class DurationType(click.ParamType[timedelta]):
    """A duration: `90`, `30s`, `1.5m`, `1h30m`, `250ms`, `2d`. A bare number is in seconds."""

    name = "duration"

    def convert(
        self,
        value: str | timedelta,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> timedelta:
        """Returns the duration, which is more than 0."""
        if isinstance(value, timedelta):
            return value
        try:
            duration = parse_duration(value)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is not a duration such as 30s, 1h30m or 250ms", param, ctx)
        if duration <= timedelta():
            self.fail(f"{value!r} must be more than 0", param, ctx)
        return duration


DURATION = DurationType()


def parse_duration(text: str) -> timedelta:
    """Parses a duration. Raises ValueError or OverflowError."""
    text = text.strip().lower()
    if re.fullmatch(r"\d+(?:\.\d+)?|\.\d+", text):
        return timedelta(seconds=float(text))
    pieces = list(_PIECE.finditer(text))
    if not pieces or "".join(piece.group() for piece in pieces) != text:
        raise ValueError(text)
    return timedelta(seconds=sum(float(p.group(1)) * _UNITS[p.group(2)] for p in pieces))


def time_ago(duration: timedelta | None) -> datetime | None:
    """Returns the time that was this long ago."""
    return None if duration is None else datetime.now(UTC) - duration


class LabelType(click.ParamType[tuple[str, str]]):
    """A label: `KEY=VALUE`."""

    name = "label"

    def convert(
        self,
        value: str | tuple[str, str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[str, str]:
        """Returns the key and the value."""
        if isinstance(value, tuple):
            return value
        key, separator, text = value.partition("=")
        if not separator:
            self.fail(f"{value!r} is not of the form KEY=VALUE", param, ctx)
        return key, text


LABEL = LabelType()


def label_option(records: str) -> Callable[[CommandT], CommandT]:
    """Returns the option `--label` of a listing."""
    return click.option(
        "--label",
        "labels",
        metavar="KEY=VALUE",
        multiple=True,
        type=LABEL,
        help=f"List only {records} with this label; repeatable.",
    )


def agent_option(records: str) -> Callable[[CommandT], CommandT]:
    """Returns the option `--agent` of a listing."""
    return click.option(
        "--agent", default="", metavar="NAME", help=f"List only {records} of this agent."
    )


def count_option(records: str) -> Callable[[CommandT], CommandT]:
    """Returns the option `-n` of a listing."""
    return click.option(
        "-n",
        "count",
        type=click.IntRange(0),
        default=20,
        show_default=True,
        help=f"Maximum number of {records}; 0: all.",
    )


def read_attachment(path: Path) -> Attachment:
    """Reads a file as an attachment: as text if it is UTF-8 and not of a binary media type."""
    data = path.read_bytes()
    # The name of a file may have any bytes; the name of an attachment is UTF-8.
    name = os.fsencode(path.name).decode(errors="replace")
    mime_type = mimetypes.guess_type(name)[0] or ""
    kind = mime_type.partition("/")[0]
    if kind in {"image", "audio", "video", "font"} or b"\0" in data:
        return Attachment(name, data, mime_type)
    try:
        return Attachment(name, data.decode(), mime_type)
    except UnicodeDecodeError:
        return Attachment(name, data, mime_type)
