"""The plan of the copy that a fork begins with: pieces of limited size, each one transaction.

A database copies its own rows, so that no transcript passes through the server. Until the fork is
created the copy belongs to no session: it has an id of its own, under which the fork keeps it.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeAlias

from runlane_server.core.model import Micros, SessionKey
from runlane_server.store.base import MessagePlace
from runlane_server.store.weight import MESSAGE_BYTES

PIECE_BYTES = 4 << 20
"""The most bytes of a piece, unless it is one large message. Other writes may wait for a piece of
each copy that is being made; `engine/forking.py` limits those."""

PIECE_ROWS = 1_000

SIZES_PER_READ = 5_000
"""Messages whose sizes are read at once."""


class MessagesPiece(NamedTuple):
    """The messages after a place, up to and with another one, with prompts and attachments.

    `copy_id`: they are themselves a copy, as the source is a fork; 0: they are its own.
    """

    copy_id: int
    after: MessagePlace
    upto: MessagePlace
    size: int


class PartsPiece(NamedTuple):
    """The parts number `first` to `last` of an attempt that were stored before their message."""

    copy_id: int
    run_id: str
    attempt: int
    first: int
    last: int
    size: int


Piece: TypeAlias = MessagesPiece | PartsPiece


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """The copy of a session's transcript up to and with a turn.

    `session_no` and `created_at` tell the session from a later one with its id.
    """

    source: SessionKey
    turn: int
    session_no: int
    created_at: Micros
    pieces: tuple[Piece, ...] = ()
    copy_id: int = field(default_factory=lambda: secrets.randbits(62) + 1)

    @property
    def tenant(self) -> str:
        """The tenant of the source."""
        return self.source.tenant

    @property
    def size(self) -> int:
        """The bytes that the copy counts as."""
        return sum(piece.size for piece in self.pieces)


class MessageSize(NamedTuple):
    """A message to copy. `bytes`: its parts, its prompt and its attachments. `long_run`: its run,
    if it is so long that parts of it were stored before it."""

    turn: int
    ordinal: int
    bytes: int
    long_run: str | None


class PartSize(NamedTuple):
    """A part to copy that was stored before its message."""

    run_id: str
    attempt: int
    number: int
    bytes: int


class SizeReader(Protocol):
    """Reads what is to be copied. `copy_id`: of the copy that the source begins with; 0: what it
    has itself."""

    async def messages(
        self, plan: CopyPlan, copy_id: int, after: MessagePlace
    ) -> Sequence[MessageSize]:
        """The next messages, up to `SIZES_PER_READ`."""
        ...

    async def parts(self, plan: CopyPlan, copy_id: int, run_id: str) -> Sequence[PartSize]:
        """The parts of a run that were stored before their messages, in order."""
        ...


async def with_pieces(plan: CopyPlan, copy_id: int, reader: SizeReader) -> CopyPlan:
    """The plan with its pieces; `copy_id` is that of the copy that the source begins with."""
    pieces: list[Piece] = []
    for source in (copy_id, 0) if copy_id else (0,):
        after: MessagePlace = (0, -1)
        long_runs: dict[str, None] = {}
        while sizes := await reader.messages(plan, source, after):
            pieces += message_pieces(source, after, sizes)
            long_runs |= dict.fromkeys(one.long_run for one in sizes if one.long_run is not None)
            after = (sizes[-1].turn, sizes[-1].ordinal)
            if len(sizes) < SIZES_PER_READ:
                break
        for run_id in long_runs:
            pieces += part_pieces(source, await reader.parts(plan, source, run_id))
    return replace(plan, pieces=tuple(pieces))


def message_pieces(
    copy_id: int, after: MessagePlace, rows: Iterable[MessageSize]
) -> Iterator[MessagesPiece]:
    """The pieces of messages that follow a place."""
    size = count = 0
    place = after
    for row in rows:
        weight = MESSAGE_BYTES + row.bytes
        if count and (size + weight > PIECE_BYTES or count == PIECE_ROWS):
            yield MessagesPiece(copy_id, after, place, size)
            after, size, count = place, 0, 0
        place = (row.turn, row.ordinal)
        size += weight
        count += 1
    if count:
        yield MessagesPiece(copy_id, after, place, size)


def part_pieces(copy_id: int, rows: Iterable[PartSize]) -> Iterator[PartsPiece]:
    """The pieces of parts, which are ordered by run, attempt and number."""
    open_piece: PartsPiece | None = None
    for run_id, attempt, number, size in rows:
        if open_piece is not None:
            same = (open_piece.run_id, open_piece.attempt) == (run_id, attempt)
            if same and open_piece.size + size <= PIECE_BYTES:
                open_piece = open_piece._replace(last=number, size=open_piece.size + size)
                continue
            yield open_piece
        open_piece = PartsPiece(copy_id, run_id, attempt, number, number, size)
    if open_piece is not None:
        yield open_piece


def message_sizes(rows: Iterable[Any]) -> list[MessageSize]:
    """The sizes of messages, from their rows."""
    return [MessageSize(row["turn"], row["ordinal"], row["bytes"], row["long_run"]) for row in rows]


def part_sizes(run_id: str, rows: Iterable[Any]) -> list[PartSize]:
    """The sizes of the parts of a run, from their rows."""
    return [PartSize(run_id, row["attempt"], row["n"], row["bytes"]) for row in rows]
