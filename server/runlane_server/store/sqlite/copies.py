"""The copies that forks begin with: how they are planned, written and read.

Reads are functions on a connection, as in `queries`.
"""

from __future__ import annotations

import sqlite3
from asyncio import Future
from collections.abc import Generator
from contextlib import closing
from functools import partial

from runlane_server.core.model import (
    Attachment,
    KeptPart,
    Message,
    Prompt,
    SessionKey,
)
from runlane_server.store.base import MessagePlace, NewSession
from runlane_server.store.codec import encode_metadata
from runlane_server.store.copies import (
    SIZES_PER_READ,
    CopyPlan,
    MessageSize,
    MessagesPiece,
    PartSize,
    Piece,
    message_sizes,
    part_sizes,
)
from runlane_server.store.lane_log import LaneChange
from runlane_server.store.records import message_from
from runlane_server.store.sqlite.connection import as_is
from runlane_server.store.sqlite.removal import remove_copy
from runlane_server.store.sqlite.rows import Result, Rows, Unit
from runlane_server.store.sqlite.transaction import SQL
from runlane_server.store.weight import session_weight

# --- Planning -----------------------------------------------------------------------------------


def copy_source(db: sqlite3.Connection, key: SessionKey, turn: int) -> tuple[CopyPlan, int] | None:
    """The plan of a copy without its pieces, and the id of the copy that the source itself begins
    with, 0 for none."""
    row = db.execute(SQL["copy_source"], key._asdict()).fetchone()
    if row is None:
        return None
    return CopyPlan(key, turn, row["created_no"], row["created_at"]), row["copy_id"] or 0


def sizes_of_messages(
    db: sqlite3.Connection, plan: CopyPlan, copy_id: int, after: MessagePlace
) -> list[MessageSize]:
    """The sizes of the next messages to copy: those of a copy, or the session's own."""
    name = "copied_message_sizes" if copy_id else "message_sizes"
    where = {
        **plan.source._asdict(),
        "copy_id": copy_id,
        "turn": after[0],
        "ordinal": after[1],
        "last_turn": plan.turn,
        "limit": SIZES_PER_READ,
    }
    return message_sizes(db.execute(SQL[name], where))


def sizes_of_parts(
    db: sqlite3.Connection, plan: CopyPlan, copy_id: int, run_id: str
) -> list[PartSize]:
    """The sizes of the parts of a run that were stored before their messages."""
    if copy_id:
        rows = db.execute(SQL["copied_part_sizes"], (copy_id, run_id))
    else:
        rows = db.execute(SQL["part_sizes"], (plan.source.tenant, run_id))
    return part_sizes(run_id, rows)


# --- Writing ------------------------------------------------------------------------------------


def start_unit(plan: CopyPlan, future: Future[Result]) -> Unit:
    """The unit that announces a copy."""
    return Unit(plan.source.tenant, {"start_copy": [(plan.copy_id,)]}, future)


def piece_unit(plan: CopyPlan, piece: Piece, future: Future[Result]) -> Unit:
    """The unit of a piece of a copy."""
    source = (piece.copy_id,) if piece.copy_id else (*plan.source,)
    copied = "copied_" if piece.copy_id else ""
    rows: Rows
    if isinstance(piece, MessagesPiece):
        row = (plan.copy_id, *source, *piece.after, *piece.upto)
        rows = {f"copy_{copied}messages": [row], f"copy_{copied}attachments": [row]}
    else:
        of_run = (piece.run_id, piece.attempt, piece.first, piece.last)
        rows = {f"copy_{copied}parts": [(plan.copy_id, source[0], *of_run)]}
    return Unit(plan.source.tenant, rows, future, size=piece.size)


def fork_unit(plan: CopyPlan, session: NewSession, future: Future[Result]) -> Unit:
    """The unit that creates the fork, once its copy is whole."""
    at = session.created_at
    row = (
        *session.key,
        plan.turn,
        session.title,
        encode_metadata(session.metadata),
        session.agent,
        plan.size + session_weight(session.title, session.metadata),
        at,
        at,
        plan.source.session_id,
        plan.turn,
        plan.copy_id,
    )
    rows: Rows = {
        "hold_source": [(*plan.source, plan.session_no, plan.created_at)],
        "create_fork": [row],
        "drop_copy": [(plan.copy_id,)],
    }
    change = LaneChange(session.key, 0, 1)
    return Unit(session.key.tenant, rows, future, lane=session.key, lane_change=change)


def drop_unit(plan: CopyPlan, future: Future[Result]) -> Unit:
    """The unit that removes a copy that no session has."""
    drops = partial(remove_copy, copy_id=plan.copy_id)
    return Unit(plan.source.tenant, {"drop_copy": [(plan.copy_id,)]}, future, removes=drops)


# --- Reading ------------------------------------------------------------------------------------


def copied_messages(
    db: sqlite3.Connection, key: SessionKey, after: MessagePlace, limit: int, run_id: str | None
) -> Generator[Message]:
    """The messages of a fork's copy after a place, up to a limit; none for other sessions."""
    copy = db.execute(SQL["copy_of"], key._asdict()).fetchone()
    if copy is None or not isinstance(copy["copy_id"], int):
        return  # no fork, or a damaged session, whose copy `check` misses
    turn, ordinal = after
    where: dict[str, int | str] = {
        "copy_id": copy["copy_id"],
        "turn": turn,
        "ordinal": ordinal,
        "limit": limit,
    }
    name = "copied_messages"
    if run_id is not None:
        name = "copied_messages_of_run"
        where["run_id"] = run_id
    with closing(db.execute(SQL[name], where)) as rows:
        for row in rows:
            yield copied_message(db, copy["copy_id"], row)


def copied_message(db: sqlite3.Connection, copy_id: int, row: sqlite3.Row) -> Message:
    """A message of a copy."""

    def read_prompt() -> Prompt:
        where = (copy_id, row["turn"], row["ordinal"])
        found = db.execute(SQL["copied_attachments"], where).fetchall()
        if row["prompt"] is None or len(found) != row["attachments"]:
            raise ValueError("its prompt is not there")
        kept = (Attachment(it["name"], it["mime_type"], it["content"]) for it in found)
        return Prompt(row["prompt"], tuple(kept))

    def read_kept(place: KeptPart) -> str | None:
        where = (copy_id, row["run_id"], place.attempt, place.number)
        part = db.execute(SQL["copied_part"], where).fetchone()
        return None if part is None else part["part"]

    return message_from(f"copy {copy_id}", row, as_is, read_prompt, read_kept)
