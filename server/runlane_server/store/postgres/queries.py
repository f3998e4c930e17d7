"""The reads of a store in PostgreSQL: records from the rows that its statements return."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from runlane_server.core.model import (
    Attachment,
    Message,
    Micros,
    Prompt,
    Run,
    RunComplete,
    RunEvent,
    RunKey,
    RunState,
    Session,
    SessionKey,
    WhenBusy,
)
from runlane_server.core.transition import Lane, LaneRun
from runlane_server.store.base import (
    BusySession,
    DeletedRun,
    IdleSession,
    LoggedComplete,
    MessagePlace,
    Page,
)
from runlane_server.store.corrupt import corrupt_complete
from runlane_server.store.inputs import decode_asking
from runlane_server.store.lane_log import LaneEntry, LanePage
from runlane_server.store.paging import (
    check_not_compacted,
    complete_size,
    entry_size,
    event_size,
    message_size,
    messages_page,
    take_page,
)
from runlane_server.store.postgres.text import unescape
from runlane_server.store.records import (
    answer_from,
    assemble_lane,
    deleted_run_from,
    entry_from,
    event_from,
    lane_from,
    logged_from,
    message_from,
    prompt_from,
    readable_keys,
    run_from,
    session_from,
    with_retry,
)

Record: TypeAlias = Mapping[str, Any]
Records: TypeAlias = Sequence[Record]

Item = TypeVar("Item")

SLACK_BYTES = 4_096
"""Bytes that a statement reads beyond the limit of a page: the size of an item on the wire differs
from that of its row."""


def _page(
    rows: Records,
    decode: Callable[[Record], Item],
    *,
    limit: int,
    max_bytes: int,
    size: Callable[[Item], int],
) -> tuple[list[Item], bool]:
    """The items of a page, and whether there are more. The column `found` counts the matching
    rows."""
    page, more = take_page(map(decode, rows), limit=limit, max_bytes=max_bytes, size=size)
    return page, more or _is_cut(rows)


# --- Lanes --------------------------------------------------------------------------------------


def lane(key: SessionKey, rows: Records) -> Lane:
    """The lane of a session, from one row for each of its open runs, and at least one row. Raises
    CorruptRecord."""
    if rows[0]["version"] is None:
        return Lane(key, is_being_removed=rows[0]["is_removed"])
    return lane_from(key, lambda: _lane(key, rows))


def _lane(key: SessionKey, rows: Records) -> Lane:
    return assemble_lane(
        key,
        version=rows[0]["version"],
        accept_seq=rows[0]["lane_accept_seq"],
        turn=rows[0]["lane_turn"],
        agent=rows[0]["lane_agent"],
        runs=[_lane_run(row) for row in rows if row["run_id"] is not None],
    )


def _lane_run(row: Record) -> LaneRun:
    run = LaneRun(
        run_id=unescape(row["run_id"]),
        accept_seq=row["accept_seq"],
        state=RunState(row["state"]),
        when_busy=WhenBusy(row["when_busy"]),
        accepted_at=row["accepted_at"],
        rank=row["rank"],
        timeout=row["timeout"],
        max_attempts=row["max_attempts"],
        attempt=row["attempt"],
        turn=row["turn"],
        events=row["events"],
        started_at=row["started_at"],
        folded_into=unescape(row["folded_into"]),
        cancel_reason=unescape(row["cancel_reason"]),
        trace=row["trace"] or "",
        host=unescape(row["host"]),
        agent=row["agent"],
        asking=decode_asking(row["asking"]),
        revision=row["revision"],
        last_update=row["last_update"] or "",
    )
    return with_retry(run, row["retry"])


def key_of(row: Record) -> SessionKey:
    """The key of the session that a row belongs to."""
    return SessionKey(unescape(row["tenant"]), unescape(row["session_id"]))


def busy_sessions(rows: Records) -> list[BusySession]:
    """Sessions with open runs."""
    return [
        BusySession(key, bool(row["active"]), row["waiting_runs"], row["agent"])
        for row, key in readable_keys(rows, unescape)
    ]


def idle_sessions(rows: Records) -> list[IdleSession]:
    """Sessions without open runs."""
    return [
        IdleSession(key, row["version"], row["accept_seq"])
        for row, key in readable_keys(rows, unescape)
    ]


def unended_runs(key: SessionKey, rows: Records, at: Micros) -> list[RunComplete]:
    """The placeholders of the terminal events of a session's open runs."""
    return [
        corrupt_complete(
            key.session_id, unescape(row["run_id"]), accept_seq=row["accept_seq"], ended_at=at
        )
        for row in rows
        if row["run_id"] is not None
    ]


# --- Runs ---------------------------------------------------------------------------------------


def run(tenant: str, row: Record) -> Run:
    """A run; if it has ended, with the text of its RunComplete."""
    if not row["message_id"]:
        return run_from(tenant, row, unescape)
    return run_from(
        tenant, row, unescape, lambda: answer_from(tenant, row["message_id"], row["parts"])
    )


def deleted_run(key: RunKey, row: Record) -> DeletedRun:
    """A run whose session was deleted."""
    return deleted_run_from(key, row, unescape)


def prompt(key: RunKey, row: Record) -> Prompt:
    """The full prompt of a run. Raises CorruptRecord."""
    return prompt_from(key, lambda: _prompt(row))


def _prompt(row: Record) -> Prompt:
    return Prompt(
        unescape(row["prompt_head"]) + unescape(row["rest"] or ""),
        tuple(_attachments(row["attachments"])),
    )


def _attachments(kept: Iterable[Sequence[Any]]) -> Iterable[Attachment]:
    for is_text, name, mime_type, content in kept:
        data = content.decode() if is_text else content
        yield Attachment(unescape(name), unescape(mime_type), data)


def run_events(
    key: RunKey,
    rows: Records,
    end: RunComplete | None,
    *,
    after: int,
    limit: int,
    max_bytes: int,
) -> list[RunEvent]:
    """The events of a run after an index. `end` is needed if the run's last event is among them."""

    def complete() -> RunComplete:
        if end is None:
            raise ValueError("the run has not ended")
        return end

    def decode(row: Record) -> RunEvent:
        return event_from(key, row, complete)

    page, _ = _page(rows, decode, limit=limit, max_bytes=max_bytes, size=event_size)
    check_not_compacted(page, after)
    return page


def lane_page(
    key: SessionKey, rows: Records, ends: Mapping[str, RunComplete], *, max_bytes: int
) -> LanePage:
    """The events of a session after a place. `ends` has the runs whose end is among them."""

    def decode(row: Record) -> LaneEntry:
        run_key = RunKey(key.tenant, unescape(row["run_id"]))
        return entry_from(row, lambda: event_from(run_key, row, lambda: ends[run_key.run_id]))

    if not rows:
        return LanePage()
    found = [row for row in rows if row["place"] is not None]
    page, _ = take_page(map(decode, found), limit=len(found), max_bytes=max_bytes, size=entry_size)
    return LanePage(tuple(page), rows[0]["start"], rows[0]["created_at"])


# --- Sessions -----------------------------------------------------------------------------------


def session(tenant: str, row: Record) -> Session:
    """A session."""
    return session_from(tenant, row, unescape)


def message(owner: str, row: Record) -> Message:
    """A message. `owner` names it in the log: a tenant, or a copy."""
    kept = {(attempt, n): part for attempt, n, part in row["kept_parts"]}
    return message_from(
        owner,
        row,
        unescape,
        lambda: _prompt(row),
        lambda place: kept.get((place.attempt, place.number)),
    )


def transcript_page(
    tenant: str, copied: Records, rows: Records, *, limit: int, max_bytes: int
) -> Page[Message, MessagePlace]:
    """A page of a transcript: what a fork had at its beginning, then its own messages."""

    def decode(row: Record) -> Message:
        return message(tenant, row)

    own = [row for row in rows if row["message_id"] is not None]
    found, is_cut = (copied, True) if _is_cut(copied) else ([*copied, *own], _is_cut(own))
    page, more = take_page(map(decode, found), limit=limit, max_bytes=max_bytes, size=message_size)
    return messages_page(page, more=more or is_cut)


def _is_cut(rows: Records) -> bool:
    """Whether a statement has left out rows that are beyond the page."""
    return bool(rows) and rows[0]["found"] > len(rows)


# --- The event log ------------------------------------------------------------------------------


def logged(row: Record) -> LoggedComplete:
    """A terminal event."""
    return logged_from(row, unescape)


def log_page(rows: Records, *, limit: int, max_bytes: int) -> tuple[list[LoggedComplete], bool]:
    """Terminal events, and whether there are more."""
    found = [row for row in rows if row["position"] is not None]

    return _page(found, logged, limit=limit, max_bytes=max_bytes, size=complete_size)
