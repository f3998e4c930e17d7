"""Pages of limited length and size, for every store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from typing import Any, TypeVar

from runlane_server.core.artifact import ArtifactPiece
from runlane_server.core.errors import CursorCompacted
from runlane_server.core.model import (
    Attachment,
    CustomEvent,
    EventBody,
    InputRequested,
    Message,
    Part,
    Reasoning,
    ReasoningDelta,
    ResultPart,
    RunComplete,
    RunEvent,
    StepResult,
    Text,
    TextDelta,
    ToolCall,
    ToolResult,
)
from runlane_server.store.base import LoggedComplete, Page
from runlane_server.store.lane_log import LaneEntry
from runlane_server.store.lookup import ListPlace

Item = TypeVar("Item")
Row = TypeVar("Row")

OVERHEAD_BYTES = 256
"""The assumed size of an item besides its content: ids, times, framing."""


def take_page(
    items: Iterable[Item], *, limit: int, max_bytes: int, size: Callable[[Item], int]
) -> tuple[list[Item], bool]:
    """The first items within both limits, at least one; and whether more items follow.

    It takes at most one item from `items` beyond the page.
    """
    page: list[Item] = []
    total = 0
    for item in items:
        total += size(item)
        if len(page) == limit or (page and total > max_bytes):
            return page, True
        page.append(item)
    return page, False


def numbered_page(
    found: Sequence[Row],
    limit: int,
    *,
    item: Callable[[Row], Item],
    number: Callable[[Row], int],
) -> Page[Item, int]:
    """A page of up to `limit` items, from rows of which there is one more if the list goes on."""
    place = number(found[limit - 1]) if len(found) > limit else None
    return Page(tuple(item(row) for row in found[:limit]), place)


def list_page(
    found: Sequence[Row],
    limit: int,
    item: Callable[[Row], Item],
    stopped: Row | None,
) -> Page[Item, ListPlace]:
    """A page of up to `limit` items of a list, of which `found` has one more if it goes on.

    `stopped` has the place where the read of a page that is not full has stopped, None at the end
    of the list.
    """
    last: Any = found[limit - 1] if len(found) > limit else stopped
    place = None if last is None else (int(last["place"]), int(last["n"]))
    return Page(tuple([item(row) for row in found[:limit]]), place)


def without_removed(
    page: Page[Row, ListPlace], decode: Callable[[Row], Item]
) -> Page[Item, ListPlace]:
    """A page of runs without those of deleted sessions, which are still to be removed."""
    kept: Sequence[Any] = page.items
    return Page(tuple([decode(row) for row in kept if not row["is_removed"]]), page.next)


def messages_page(messages: Sequence[Message], *, more: bool) -> Page[Message, tuple[int, int]]:
    """A page of a transcript."""
    place = (messages[-1].turn, messages[-1].ordinal) if more else None
    return Page(tuple(messages), place)


def check_not_compacted(page: Sequence[RunEvent], after: int) -> None:
    """Raises CursorCompacted if the next event after index `after` was removed.

    Indices have no gaps, and compaction removes the first events of a run.
    """
    if page and page[0].index != after + 1:
        raise CursorCompacted(
            "the events of the run after that index were removed;"
            " call GetRun for its outcome and ListMessages for its transcript"
        )


def message_size(message: Message) -> int:
    """The approximate size of a message on the wire, in bytes."""
    return OVERHEAD_BYTES + sum(_size(part) for part in message.parts)


def event_size(event: RunEvent) -> int:
    """The approximate size of a run's event on the wire, in bytes."""
    return OVERHEAD_BYTES + _size(event.body)


def entry_size(entry: LaneEntry) -> int:
    """The approximate size of a session's event on the wire, in bytes."""
    return event_size(entry.event)


def complete_size(event: LoggedComplete) -> int:
    """The approximate size of a terminal event on the wire, in bytes."""
    return OVERHEAD_BYTES + _size(event.complete)


def _size(content: Part | EventBody) -> int:  # noqa: PLR0911 - one per kind
    match content:
        case TextDelta(text) | ReasoningDelta(text) | Text(text) | Reasoning(text):
            return len(text.encode())
        case RunComplete():
            return OVERHEAD_BYTES + len(content.text.encode()) + len(content.result.encode())
        case InputRequested():
            return sum(len(text.encode()) for text in astuple(content) if isinstance(text, str))
        case ToolCall():
            return len(content.name) + len(content.arguments_json.encode())
        case ToolResult():
            return len(content.name) + len(content.content.encode())
        case Attachment():
            return len(content.name) + content.size
        case ArtifactPiece():
            return OVERHEAD_BYTES + content.size
        case CustomEvent(name, text) | StepResult(name, text):
            return len(name) + len(text.encode())
        case ResultPart(text):
            return len(text.encode())
        case _:
            return 0
