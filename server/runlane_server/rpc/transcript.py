"""Pages of a transcript, which end between two messages or within an oversized one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from runlane.v1 import session_pb2
from runlane_server.core import model
from runlane_server.rpc import convert
from runlane_server.rpc.page import ITEM_OVERHEAD, PAGE_BYTES
from runlane_server.store.base import MessagePlace, Page


class Mark(NamedTuple):
    """The end of a page: before `part` of a message, or after the message if `part` is 0."""

    turn: int
    ordinal: int
    part: int

    @classmethod
    def before_turn(cls, turn: int) -> Self:
        """The place before the first message of a turn."""
        return cls(turn, -1, 0)

    @property
    def read_after(self) -> MessagePlace:
        """The place after which to read the next page from the store."""
        return (self.turn, self.ordinal - 1 if self.part else self.ordinal)


@dataclass(frozen=True, slots=True)
class Layout:
    """The messages of a page; `next` is None after the last page."""

    messages: Sequence[session_pb2.Message]
    next: Mark | None


def lay_out(page_read: Page[model.Message, MessagePlace], start: Mark | None) -> Layout:
    """Fills a page of `PAGE_BYTES` with the messages read after `start`; at least one part."""
    page: list[session_pb2.Message] = []
    end = start
    room = PAGE_BYTES
    for message in page_read.items:
        wire = convert.message_head(message)
        room -= wire.ByteSize() + ITEM_OVERHEAD
        for n, part in _parts(message, start):
            room -= part.ByteSize() + ITEM_OVERHEAD
            if room < 0 and wire.parts:
                wire.continues = True
                return Layout([*page, wire], Mark(message.turn, message.ordinal, n))
            if room < 0 and page:
                return Layout(page, end)
            wire.parts.append(part)
        page.append(wire)
        end = Mark(message.turn, message.ordinal, 0)
    return Layout(page, end if page_read.next is not None else None)


def _parts(message: model.Message, start: Mark | None) -> Iterator[tuple[int, session_pb2.Part]]:
    """The parts of a message that follow `start`, with their numbers."""
    resumed = start is not None and (start.turn, start.ordinal) == (message.turn, message.ordinal)
    first = start.part if start is not None and resumed else 0
    for n in range(first, len(message.parts)):
        yield n, convert.part(message.parts[n])
