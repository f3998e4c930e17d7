"""The reads of a store in a SQLite file, as functions on a connection.

Each runs in the reader's thread, without interruption.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable
from typing import Any

from runlane_server.core.model import (
    Attachment,
    Message,
    Micros,
    Prompt,
    Role,
    Run,
    RunEvent,
    RunKey,
    RunState,
    Session,
    SessionKey,
    WhenBusy,
)
from runlane_server.core.transition import Lane, LaneRun
from runlane_server.store.base import BusySession, IdleSession, MessagePlace, Page
from runlane_server.store.codec import RUN_COMPLETE, decode_body, decode_parts
from runlane_server.store.paging import (
    check_not_compacted,
    event_size,
    message_size,
    messages_page,
    numbered_page,
    take_page,
)
from runlane_server.store.records import (
    END_OF_LIST,
    OPEN_STATES,
    assemble_lane,
    complete_text,
    message_from,
    prompt_parts,
    run_from,
    session_from,
)
from runlane_server.store.sqlite.apply import SQL
from runlane_server.store.weight import SESSION_BYTES


def _as_is(text: str) -> str:
    """SQLite keeps any text as it is."""
    return text


# --- Lanes --------------------------------------------------------------------------------------


def lane(db: sqlite3.Connection, key: SessionKey) -> Lane:
    """The lane of a session."""
    rows = db.execute(SQL["lane"], key).fetchall()
    if not rows:
        return Lane(key)
    version, accept_seq, turn = rows[0][:3]
    runs = [_lane_run(*tuple(row)[3:]) for row in rows if row["run_id"] is not None]
    runs.sort(key=lambda run: run.accept_seq)
    return assemble_lane(key, version=version, accept_seq=accept_seq, turn=turn, runs=runs)


def _lane_run(run_id: str, accept_seq: int, state: str, when_busy: str, *rest: Any) -> LaneRun:
    return LaneRun(run_id, accept_seq, RunState(state), WhenBusy(when_busy), *rest)


def busy_sessions(db: sqlite3.Connection) -> list[BusySession]:
    """All sessions with open runs, the longest waiting first."""
    return [
        BusySession(
            SessionKey(row["tenant"], row["session_id"]), bool(row["active"]), row["waiting_runs"]
        )
        for row in db.execute(SQL["busy_sessions"])
    ]


# --- Runs ---------------------------------------------------------------------------------------


def run(db: sqlite3.Connection, key: RunKey) -> Run | None:
    """A run; if it has ended, with the text of its RunComplete."""
    number = db.execute(SQL["run_no"], key).fetchone()
    if number is None:
        return None
    row = db.execute(SQL["run"], dict(number)).fetchone()
    return run_from(row, _as_is, *_complete_text(db, key.tenant, row))


def list_runs(
    db: sqlite3.Connection,
    tenant: str,
    *,
    session_id: str | None,
    states: Collection[RunState],
    after: int | None,
    limit: int,
) -> Page[Run, int]:
    """A page of runs, the latest accepted first."""
    where = {
        "tenant": tenant,
        "session_id": session_id,
        "before": END_OF_LIST if after is None else after,
        "limit": limit + 1,
    }
    if session_id is None:
        numbers = _numbers_of_tenant(db, where, frozenset(states or RunState))
    elif states:
        numbers = _numbers(
            db, "runs_of_session_in_states", where | {"states": json.dumps([*states])}
        )
    else:
        numbers = _numbers(db, "runs_of_session", where)

    def read(number: int) -> Run:
        return run_from(db.execute(SQL["run"], {"run_no": number}).fetchone(), _as_is)

    return numbered_page(numbers, limit, item=read, number=lambda number: number)


def _numbers_of_tenant(
    db: sqlite3.Connection, where: dict[str, Any], states: frozenset[RunState]
) -> list[int]:
    """The numbers of a page, merged from a page of each index that covers some of the states."""
    numbers: list[int] = []
    if states >= OPEN_STATES:
        numbers += _numbers(db, "open_runs", where)
    elif states & OPEN_STATES:
        numbers += _numbers(
            db, "open_runs_in_states", where | {"states": json.dumps([*(states & OPEN_STATES)])}
        )
    for state in states - OPEN_STATES:
        numbers += _numbers(db, "ended_runs_in_state", where | {"state": state})
    return sorted(numbers, reverse=True)[: where["limit"]]


def _numbers(db: sqlite3.Connection, name: str, where: dict[str, Any]) -> list[int]:
    return [row[0] for row in db.execute(SQL[name], where)]


def _complete_text(db: sqlite3.Connection, tenant: str, row: sqlite3.Row) -> tuple[str, bool]:
    """The text of a run's last message, and whether it was truncated. Empty while the run is open,
    and for a run without a message."""
    if not row["message_id"]:
        return "", False
    where = {
        "tenant": tenant,
        "session_id": row["session_id"],
        "turn": row["turn"],
        "message_id": row["message_id"],
    }
    message = db.execute(SQL["message_parts"], where).fetchone()
    return complete_text(decode_parts(message["parts"]))


def prompt(db: sqlite3.Connection, key: RunKey) -> Prompt | None:
    """The full prompt of a run."""
    row = db.execute(SQL["prompt"], key).fetchone()
    if row is None:
        return None
    attachments: Iterable[sqlite3.Row] = ()
    if row["attachments"]:
        attachments = db.execute(SQL["attachments"], key)
    return Prompt(
        row["prompt_head"] + (row["rest"] or ""),
        tuple(Attachment(it["name"], it["mime_type"], it["content"]) for it in attachments),
    )


def run_events(
    db: sqlite3.Connection, key: RunKey, after: int, limit: int, max_bytes: int
) -> list[RunEvent]:
    """The events of a run after an index."""
    where = {**key._asdict(), "after": after, "limit": limit}
    events = (_run_event(db, key, row) for row in db.execute(SQL["run_events"], where))
    page, _ = take_page(events, limit=limit, max_bytes=max_bytes, size=event_size)
    check_not_compacted(page, after)
    return page


def _run_event(db: sqlite3.Connection, key: RunKey, row: sqlite3.Row) -> RunEvent:
    if row["kind"] != RUN_COMPLETE:
        return RunEvent(key.run_id, row["idx"], row["at"], decode_body(row["kind"], row["body"]))
    ended = run(db, key)
    assert ended is not None and ended.complete is not None  # noqa: S101, PT018
    return RunEvent(key.run_id, row["idx"], row["at"], ended.complete)


# --- Sessions -----------------------------------------------------------------------------------


def session(db: sqlite3.Connection, key: SessionKey) -> Session | None:
    """A session."""
    row = db.execute(SQL["session"], key._asdict()).fetchone()
    return None if row is None else session_from(row, _as_is)


def list_sessions(
    db: sqlite3.Connection, tenant: str, after: int | None, limit: int
) -> Page[Session, int]:
    """A page of sessions, the latest created first."""
    where = {
        "tenant": tenant,
        "before": END_OF_LIST if after is None else after,
        "limit": limit + 1,
    }
    rows = db.execute(SQL["sessions"], where).fetchall()
    return numbered_page(
        rows,
        limit,
        item=lambda row: session_from(row, _as_is),
        number=lambda row: int(row["created_no"]),
    )


def stored_bytes(db: sqlite3.Connection, tenant: str, after: int, limit: int) -> tuple[int, int]:
    """The stored bytes of up to `limit` of a tenant's sessions, and the place of the last of them;
    0 if there are no more."""
    bytes_, found, last = db.execute(SQL["stored_bytes"], (tenant, after, limit)).fetchone()
    return bytes_ + SESSION_BYTES * found, last if found == limit else 0


def stale_sessions(db: sqlite3.Connection, before: Micros, limit: int) -> list[IdleSession]:
    """Idle sessions whose last write was before `before`, the oldest first."""
    rows = db.execute(SQL["stale_sessions"], {"before": before, "limit": limit})
    return [
        IdleSession(SessionKey(row["tenant"], row["session_id"]), row["version"], row["accept_seq"])
        for row in rows
    ]


def list_messages(
    db: sqlite3.Connection,
    key: SessionKey,
    after: MessagePlace | None,
    limit: int,
    max_bytes: int,
) -> Page[Message, MessagePlace]:
    """A page of the transcript after a place."""
    turn, ordinal = (0, 0) if after is None else after
    where = {**key._asdict(), "turn": turn, "ordinal": ordinal, "limit": limit + 1}
    messages = (_message(db, key.tenant, row) for row in db.execute(SQL["messages"], where))
    page, more = take_page(messages, limit=limit, max_bytes=max_bytes, size=message_size)
    return messages_page(page, more=more)


def _message(db: sqlite3.Connection, tenant: str, row: sqlite3.Row) -> Message:
    role = Role(row["role"])
    parts = decode_parts(row["parts"])
    if role is Role.USER:
        asked = prompt(db, RunKey(tenant, row["run_id"]))
        assert asked is not None  # noqa: S101 - a message is deleted together with its run
        parts = prompt_parts(asked)
    return message_from(row, _as_is, role, parts)
