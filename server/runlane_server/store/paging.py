"""What the stores share in reading: pages of limited size, and what is put together for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import TypeVar

from runlane_server.core.errors import CursorCompacted
from runlane_server.core.model import (
    MAX_COMPLETE_TEXT_BYTES,
    Attachment,
    EventBody,
    Message,
    Part,
    Prompt,
    Reasoning,
    ReasoningDelta,
    RunComplete,
    RunEvent,
    Text,
    TextDelta,
    ToolCall,
    ToolResult,
    cut_utf8,
)
from runlane_server.store.base import LoggedComplete

Item = TypeVar("Item")

OVERHEAD_BYTES = 256
"""What an item is taken to weigh beside its content: ids, times, framing."""


def fill(
    items: Iterable[Item], *, limit: int, max_bytes: int, size: Callable[[Item], int]
) -> tuple[list[Item], bool]:
    """The first items that fit, but one at least; and whether there are more.

    One item beyond those is taken from `items`, no further ones.
    """
    page: list[Item] = []
    weight = 0
    for item in items:
        weight += size(item)
        if len(page) == limit or (page and weight > max_bytes):
            return page, True
        page.append(item)
    return page, False


def check_kept(page: Sequence[RunEvent], after: int) -> None:
    """Raises CursorCompacted if the events right behind `after` are not there any more.

    The events of a run are numbered without a gap, and a prefix of them is removed.
    """
    if page and page[0].index != after + 1:
        raise CursorCompacted(
            "the events of the run after that index were removed; "
            "GetRun tells how it ended, ListMessages what was said"
        )


def by_run(events: Sequence[RunEvent]) -> list[tuple[str, list[RunEvent]]]:
    """The events of each run, in order: as a listener is told of them."""
    if not events:
        return []
    first = events[0].run_id
    if len(events) == 1 or all(event.run_id == first for event in events):
        return [(first, list(events))]
    ordered = sorted(events, key=lambda event: event.run_id)  # stable: the order within a run stays
    return [(run_id, list(own)) for run_id, own in groupby(ordered, key=lambda it: it.run_id)]


def message_size(message: Message) -> int:
    """About how many bytes a message weighs on the wire."""
    return OVERHEAD_BYTES + sum(_size(part) for part in message.parts)


def event_size(event: RunEvent) -> int:
    """About how many bytes an event of a run weighs on the wire."""
    return OVERHEAD_BYTES + _size(event.body)


def complete_size(event: LoggedComplete) -> int:
    """About how many bytes a terminal event weighs on the wire."""
    return OVERHEAD_BYTES + _size(event.complete)


def _size(content: Part | EventBody) -> int:
    match content:
        case TextDelta(text) | ReasoningDelta(text) | Text(text) | Reasoning(text):
            return len(text.encode())
        case RunComplete():
            return OVERHEAD_BYTES + len(content.text.encode())
        case ToolCall():
            return len(content.name) + len(content.arguments_json.encode())
        case ToolResult():
            return len(content.name) + len(content.content.encode())
        case Attachment():
            return len(content.name) + content.size
        case _:
            return 0


def prompt_parts(prompt: Prompt) -> tuple[Part, ...]:
    """What a user message consists of: the text, unless it is blank, then the attachments."""
    text: tuple[Part, ...] = (Text(prompt.text),) if prompt.text.strip() else ()
    return (*text, *prompt.attachments)


def complete_text(parts: Sequence[Part]) -> tuple[str, bool]:
    """The text that a RunComplete has of its message, and whether it was cut."""
    text = "".join(part.text for part in parts if isinstance(part, Text))
    return cut_utf8(text, MAX_COMPLETE_TEXT_BYTES)
