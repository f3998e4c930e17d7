"""Formats records: as tables for people, as lines for programs."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime, timedelta
from typing import Any, Generic, TypeVar

from rich.table import Table
from rich.text import Text

from runlane.cli.run_ids import short_ids
from runlane.cli.terminal import (
    SafeConsole,
    echo,
    encodes_all,
    escaped,
    escaped_json,
    for_terminal,
    on_terminal,
)
from runlane.pager import Pager
from runlane.session_stream import SessionEvent
from runlane.types import Artifact, Attachment, Custom, FinishReason, Message, RunEvent, RunState

RecordT = TypeVar("RecordT")

COLOURS: Mapping[RunState, str] = {
    RunState.ACCEPTED: "cyan",
    RunState.QUEUED: "cyan",
    RunState.ACTIVE: "blue",
    RunState.INPUT_REQUIRED: "magenta",
    RunState.FOLDED: "blue",
    RunState.CANCELLING: "yellow",
    RunState.COMPLETED: "green",
    RunState.CANCELLED: "yellow",
    RunState.FAILED: "red",
}


def stderr_console() -> SafeConsole:
    """Returns a console for notes that are not part of the output."""
    return SafeConsole(stderr=True, wrap=False)


def one_line(text: str, limit: int = 80) -> str:
    """Returns the beginning of a text on one line, for people."""
    line = " ".join(for_terminal(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def field(value: object) -> str:
    """Formats a value as a field of a tab-separated line; escapes what a terminal obeys."""
    match value:
        case None:
            text = ""
        case datetime():
            text = value.isoformat()
        case FinishReason():
            text = finish_text(value)
        case _:
            text = str(value)
    text = text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n")
    return escaped(text)


def tsv(values: Sequence[object]) -> str:
    """Formats a tab-separated line."""
    return "\t".join(map(field, values))


# --- JSON ----------------------------------------------------------------------------------------


def to_json(value: object) -> Any:  # noqa: C901, PLR0911 - one per type
    """Converts a record to JSON types: times in ISO 8601, durations in seconds, bytes in base64."""
    match value:
        case RunEvent():
            return {"index": value.index, "time": to_json(value.time), **_typed(value.body)}
        case SessionEvent():
            place = {"session_id": value.session_id, "cursor": value.cursor}
            return {**place, **_typed(value.body)}
        case Message():
            return _record(value) | {"parts": [_typed(part) for part in value.parts]}
        case Custom():
            return {"custom_type": value.type, "json": value.json}
        case Attachment(content=bytes()) | Artifact(content=bytes()):
            return _record(value) | {"encoding": "base64"}
        case datetime():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case bytes():
            return base64.b64encode(value).decode()
        case Mapping():
            return {str(key): to_json(each) for key, each in value.items()}
        case tuple() | list():
            return [to_json(each) for each in value]
        case _ if is_dataclass(value) and not isinstance(value, type):
            return _record(value)
        case _:
            return value


def _record(value: Any) -> dict[str, Any]:
    return {each.name: to_json(getattr(value, each.name)) for each in fields(value)}


def _typed(value: object) -> dict[str, Any]:
    """Converts a record and adds its type."""
    kind = re.sub(r"(?<!^)([A-Z])", r"_\1", type(value).__name__).lower()
    return {"type": kind, **to_json(value)}


def json_line(value: object) -> str:
    """Formats a record as one line of JSON, with escapes for what a terminal obeys."""
    ascii_only = not encodes_all()
    return escaped_json(json.dumps(to_json(value), ensure_ascii=ascii_only, separators=(",", ":")))


# --- Listings ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column(Generic[RecordT]):
    """A column: the title, the value for programs, and optionally a different cell for people."""

    title: str
    value: Callable[[RecordT], object]
    render: Callable[[RecordT], str | Text] | None = None
    is_run_id: bool = False

    def cell(self, record: RecordT) -> Text:
        """Returns the cell for people."""
        if self.render is None:
            value = self.value(record)
            return Text(time_text(value) if isinstance(value, datetime) else one_line(field(value)))
        cell = self.render(record)
        return cell if isinstance(cell, Text) else Text(one_line(cell))


def time_text(time: datetime | None) -> str:
    """Formats a time for people, in the local time zone; omits the date of today."""
    if time is None:
        return ""
    local = time.astimezone()
    today = local.date() == datetime.now(local.tzinfo).date()
    return local.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S")


def duration_text(begin: datetime | None, end: datetime | None) -> str:
    """Formats the time between two times for people."""
    if begin is None or end is None:
        return ""
    seconds = (end - begin).total_seconds()
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def state_text(state: RunState) -> Text:
    """Formats a state with its colour."""
    return Text(str(state), style=COLOURS.get(state, ""))


def finish_text(reason: FinishReason | None) -> str:
    """Formats a finish reason, spelled like the state `cancelled`."""
    if reason is FinishReason.CANCELED:
        return str(RunState.CANCELLED)
    return str(reason or "")


_MIN_WIDTH = 100
"""Minimum width of a listing in columns. A narrower terminal wraps the lines, which stay readable;
cells of a few letters would not."""

_FLEXIBLE = {"SESSION", "PROMPT", "TITLE", "TEXT", "ERROR"}


def table(columns: Sequence[Column[RecordT]]) -> Table:
    """Creates an empty table for people."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        grid.add_column(column.title, overflow="fold", no_wrap=column.title not in _FLEXIBLE)
    return grid


def rows(
    columns: Sequence[Column[RecordT]], records: Sequence[RecordT]
) -> Iterator[Sequence[Text]]:
    """Yields the cells of each record for people, with run ids as short as they are unique."""
    short = short_ids(
        str(column.value(record)) for column in columns if column.is_run_id for record in records
    )
    for record in records:
        yield [
            Text(one_line(field(short[str(column.value(record))])))
            if column.is_run_id
            else column.cell(record)
            for column in columns
        ]


async def show(
    records: AsyncIterator[RecordT],
    columns: Sequence[Column[RecordT]],
    *,
    as_json: bool,
    empty_note: str,
) -> int:
    """Prints a listing; for people, `empty_note` replaces an empty one. Returns its length."""
    if as_json or not on_terminal():
        count = 0
        async for record in records:
            values = [column.value(record) for column in columns]
            echo(json_line(record) if as_json else tsv(values))
            count += 1
        return count
    grid = table(columns)
    for cells in rows(columns, [record async for record in records]):
        grid.add_row(*cells)
    if grid.row_count:
        width = max(SafeConsole().width, _MIN_WIDTH)
        SafeConsole(width=width).print(grid)
    else:
        stderr_console().print(empty_note, style="dim")
    return grid.row_count


async def show_list(
    pager: Pager[RecordT],
    limit: int,
    columns: Sequence[Column[RecordT]],
    *,
    as_json: bool,
    empty_note: str,
) -> int:
    """Prints the first records of a list, 0: all; and their number on stderr, if it was counted.

    Returns how many it printed.
    """
    records = take(_records(pager), limit)
    return await show(records, columns, as_json=as_json, empty_note=empty_note)


async def _records(pager: Pager[RecordT]) -> AsyncIterator[RecordT]:
    is_first = True
    async for page in pager.pages():
        if is_first and page.total_size is not None:
            total = f"at least {page.total_size}" if page.total_size_is_minimum else page.total_size
            stderr_console().print(f"{total} in all", style="dim")
        is_first = False
        for record in page.items:
            yield record


async def take(records: AsyncIterator[RecordT], limit: int) -> AsyncIterator[RecordT]:
    """Yields the first records of a listing; 0: all."""
    count = 0
    async for record in records:
        yield record
        count += 1
        if count == limit:
            return
