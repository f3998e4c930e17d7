"""How records are shown: to people as tables, to programs as lines."""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime, timedelta
from typing import Any, Generic, TypeVar

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from runlane.types import Attachment, Message, RunEvent, RunState

RecordT = TypeVar("RecordT")

COLOURS: Mapping[RunState, str] = {
    RunState.ACCEPTED: "cyan",
    RunState.QUEUED: "cyan",
    RunState.ACTIVE: "blue",
    RunState.FOLDED: "blue",
    RunState.CANCELLING: "yellow",
    RunState.COMPLETED: "green",
    RunState.CANCELLED: "yellow",
    RunState.FAILED: "red",
}

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def on_terminal() -> bool:
    """Whether stdout is for people."""
    # Where it is closed (`>&-`) there is none.
    return sys.stdout is not None and sys.stdout.isatty()


def stderr_console() -> Console:
    """Where people are told what is not part of the output."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def for_terminal(text: str) -> str:
    """Text without what could steer the terminal; lines and tabs stay."""
    return _CONTROL.sub("", text)


def one_line(text: str, limit: int = 80) -> str:
    """The beginning of a text, on one line, for people."""
    line = " ".join(for_terminal(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def field(value: object) -> str:
    """A value as one field of a tab-separated line: nothing in it breaks the line."""
    text = value.isoformat() if isinstance(value, datetime) else "" if value is None else str(value)
    text = text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n")
    return _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def tsv(values: Sequence[object]) -> str:
    """A tab-separated line."""
    return "\t".join(map(field, values))


# --- JSON ----------------------------------------------------------------------------------------


def plain(value: object) -> Any:  # noqa: PLR0911 - one per type
    """A record as what JSON knows: times in ISO 8601, spans in seconds, bytes in base64."""
    match value:
        case RunEvent():
            return {"index": value.index, "time": plain(value.time), **_typed(value.body)}
        case Message():
            return _record(value) | {"parts": [_typed(part) for part in value.parts]}
        case Attachment(content=bytes()):
            return _record(value) | {"encoding": "base64"}
        case datetime():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case bytes():
            return base64.b64encode(value).decode()
        case Mapping():
            return {str(key): plain(each) for key, each in value.items()}
        case tuple() | list():
            return [plain(each) for each in value]
        case _ if is_dataclass(value) and not isinstance(value, type):
            return _record(value)
        case _:
            return value


def _record(value: Any) -> dict[str, Any]:
    return {each.name: plain(getattr(value, each.name)) for each in fields(value)}


def _typed(value: object) -> dict[str, Any]:
    """One of several kinds of records, with which of them it is."""
    kind = re.sub(r"(?<!^)([A-Z])", r"_\1", type(value).__name__).lower()
    return {"type": kind, **plain(value)}


def json_line(value: object) -> str:
    """A record as one line of JSON."""
    return json.dumps(plain(value), ensure_ascii=False, separators=(",", ":"))


# --- Listings ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column(Generic[RecordT]):
    """A column: its title, what stands in it in a pipe, and what people see instead."""

    title: str
    value: Callable[[RecordT], object]
    shown: Callable[[RecordT], str | Text] | None = None

    def cell(self, record: RecordT) -> Text:
        """What people see."""
        if self.shown is None:
            value = self.value(record)
            return Text(when(value) if isinstance(value, datetime) else one_line(field(value)))
        cell = self.shown(record)
        return cell if isinstance(cell, Text) else Text(one_line(cell))


def when(time: datetime | None) -> str:
    """A time for people, in their zone; without the date if it is today's."""
    if time is None:
        return ""
    local = time.astimezone()
    today = local.date() == datetime.now(local.tzinfo).date()
    return local.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S")


def took(begin: datetime | None, end: datetime | None) -> str:
    """How long something took, for people."""
    if begin is None or end is None:
        return ""
    seconds = (end - begin).total_seconds()
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def coloured(state: RunState) -> Text:
    """A state in its colour."""
    return Text(str(state), style=COLOURS.get(state, ""))


_NARROWEST = 100
"""How wide listings are laid out at the least, in columns. A narrower terminal breaks the lines:
that can be read and copied, as cells of a few letters cannot."""

_LONG = {"SESSION", "PROMPT", "TITLE", "TEXT"}


def table(columns: Sequence[Column[RecordT]]) -> Table:
    """An empty table for people."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        # What is short stays in one piece; what is long gives way on a narrow terminal.
        grid.add_column(column.title, overflow="fold", no_wrap=column.title not in _LONG)
    return grid


async def show(
    records: AsyncIterator[RecordT],
    columns: Sequence[Column[RecordT]],
    *,
    as_json: bool,
    nothing: str,
) -> None:
    """Shows a listing; `nothing` is what people are told of an empty one."""
    if as_json or not on_terminal():
        async for record in records:
            values = [column.value(record) for column in columns]
            click.echo(json_line(record) if as_json else tsv(values))
        return
    grid = table(columns)
    async for record in records:
        grid.add_row(*(column.cell(record) for column in columns))
    if grid.row_count:
        width = max(Console().width, _NARROWEST)
        Console(highlight=False, width=width).print(grid)
    else:
        stderr_console().print(nothing, style="dim")


async def first(records: AsyncIterator[RecordT], limit: int) -> AsyncIterator[RecordT]:
    """The first records of a listing; 0: all of them."""
    count = 0
    async for record in records:
        yield record
        count += 1
        if count == limit:
            return
