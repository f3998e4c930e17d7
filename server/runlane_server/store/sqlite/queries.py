"""What is read, as plain functions on a connection. Each runs in the reader's thread in one go."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable
from typing import Any

from runlane_server.core.model import (
    Attachment,
    FinishReason,
    Message,
    Micros,
    Prompt,
    Role,
    Run,
    RunComplete,
    RunError,
    RunEvent,
    RunKey,
    RunState,
    Session,
    SessionKey,
    Usage,
    WhenBusy,
)
from runlane_server.core.transition import Lane, LaneRun
from runlane_server.store.base import (
    BusySession,
    IdleSession,
    MessagePlace,
    Page,
)
from runlane_server.store.codec import (
    RUN_COMPLETE,
    decode_body,
    decode_metadata,
    decode_parts,
    decode_usage,
)
from runlane_server.store.paging import (
    check_kept,
    complete_text,
    event_size,
    fill,
    message_size,
    prompt_parts,
)
from runlane_server.store.sqlite.apply import SQL

_END_OF_LIST = (1 << 63) - 1
_OPEN = frozenset(state for state in RunState if not state.is_terminal)


# --- Lanes --------------------------------------------------------------------------------------


def lane(db: sqlite3.Connection, key: SessionKey) -> Lane:
    """The lane of a session."""
    rows = db.execute(SQL["lane"], key).fetchall()
    if not rows:
        return Lane(key)
    version, accept_seq, turn = rows[0][:3]
    runs = [_lane_run(*tuple(row)[3:]) for row in rows if row["run_id"] is not None]
    runs.sort(key=lambda run: run.accept_seq)
    folded = [run for run in runs if run.folded_into]
    waiting = [run for run in runs if run.state in {RunState.ACCEPTED, RunState.QUEUED}]
    active = [run for run in runs if run not in folded and run not in waiting]
    return Lane(
        key,
        version=version,
        accept_seq=accept_seq,
        turn=turn,
        active=active[0] if active else None,
        folded=tuple(folded),
        waiting=tuple(sorted(waiting, key=lambda run: run.rank)),
    )


def _lane_run(run_id: str, accept_seq: int, state: str, when_busy: str, *rest: Any) -> LaneRun:
    return LaneRun(run_id, accept_seq, RunState(state), WhenBusy(when_busy), *rest)


def busy_sessions(db: sqlite3.Connection) -> list[BusySession]:
    """All sessions with open runs."""
    return [
        BusySession(
            SessionKey(row["tenant"], row["session_id"]), bool(row["active"]), row["waiting_runs"]
        )
        for row in db.execute(SQL["busy_sessions"])
    ]


# --- Runs ---------------------------------------------------------------------------------------


def run(db: sqlite3.Connection, key: RunKey) -> Run | None:
    """A run, with the text of its end."""
    number = db.execute(SQL["run_no"], key).fetchone()
    if number is None:
        return None
    row = db.execute(SQL["run"], dict(number)).fetchone()
    return _run(row, *_text_of_end(db, key.tenant, row))


def list_runs(
    db: sqlite3.Connection,
    tenant: str,
    *,
    session_id: str | None,
    states: Collection[RunState],
    after: int | None,
    limit: int,
) -> Page[Run, int]:
    """Runs, the latest accepted first."""
    where = {
        "tenant": tenant,
        "session_id": session_id,
        "before": _END_OF_LIST if after is None else after,
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
    found = [db.execute(SQL["run"], {"run_no": number}).fetchone() for number in numbers[:limit]]
    return Page(tuple(_run(row) for row in found), numbers[limit - 1] if numbers[limit:] else None)


def _numbers_of_tenant(
    db: sqlite3.Connection, where: dict[str, Any], states: frozenset[RunState]
) -> list[int]:
    """A page of each index that has some of them; merged, the page of all."""
    numbers: list[int] = []
    if states >= _OPEN:
        numbers += _numbers(db, "open_runs", where)
    elif states & _OPEN:
        numbers += _numbers(
            db, "open_runs_in_states", where | {"states": json.dumps([*(states & _OPEN)])}
        )
    for state in states - _OPEN:
        numbers += _numbers(db, "ended_runs_in_state", where | {"state": state})
    return sorted(numbers, reverse=True)[: where["limit"]]


def _numbers(db: sqlite3.Connection, name: str, where: dict[str, Any]) -> list[int]:
    return [row[0] for row in db.execute(SQL[name], where)]


def _run(row: sqlite3.Row, text: str = "", text_truncated: bool = False) -> Run:
    state = RunState(row["state"])
    return Run(
        session_id=row["session_id"],
        run_id=row["run_id"],
        accept_seq=row["accept_seq"],
        state=state,
        when_busy=WhenBusy(row["when_busy"]),
        prompt_excerpt=row["prompt_head"],
        prompt_fingerprint=row["prompt_fingerprint"],
        metadata=decode_metadata(row["metadata"]),
        timeout=row["timeout"],
        max_attempts=row["max_attempts"],
        attempt=row["attempt"],
        accepted_at=row["accepted_at"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        folded_into=row["folded_into"],
        complete=_complete(row, text, text_truncated) if state.is_terminal else None,
    )


def _complete(row: sqlite3.Row, text: str, text_truncated: bool) -> RunComplete:
    error = row["error_reason"]
    return RunComplete(
        session_id=row["session_id"],
        run_id=row["run_id"],
        accept_seq=row["accept_seq"],
        state=RunState(row["state"]),
        finish_reason=FinishReason(row["finish_reason"]),
        message_id=row["message_id"],
        text=text,
        text_truncated=text_truncated,
        error=None if error is None else RunError(error, row["error_message"]),
        folded_into=row["folded_into"],
        usage=decode_usage(row["usage"]),
        attempt=row["attempt"],
        cancel_reason=row["cancel_reason"],
        accepted_at=row["accepted_at"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
    )


def _text_of_end(db: sqlite3.Connection, tenant: str, row: sqlite3.Row) -> tuple[str, bool]:
    """The text of the message that a run ended with; none before the end, or without a message."""
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
    """The prompt of a run, whole."""
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
    page = fill(events, limit=limit, max_bytes=max_bytes, size=event_size)[0]
    check_kept(page, after)
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
    return None if row is None else _session(row)


def list_sessions(
    db: sqlite3.Connection, tenant: str, after: int | None, limit: int
) -> Page[Session, int]:
    """Sessions, the latest created first."""
    where = {
        "tenant": tenant,
        "before": _END_OF_LIST if after is None else after,
        "limit": limit + 1,
    }
    rows = db.execute(SQL["sessions"], where).fetchall()
    place = rows[limit - 1]["created_no"] if rows[limit:] else None
    return Page(tuple(_session(row) for row in rows[:limit]), place)


def stored_bytes(db: sqlite3.Connection, tenant: str, after: int, limit: int) -> tuple[int, int]:
    """What a piece of a tenant's sessions has stored, and the place of its last one; 0 if that is
    the end."""
    bytes_, found, last = db.execute(SQL["stored_bytes"], (tenant, after, limit)).fetchone()
    return bytes_, last if found == limit else 0


def stale_sessions(db: sqlite3.Connection, before: Micros, limit: int) -> list[IdleSession]:
    """Idle sessions that were last written to before, the longest untouched first."""
    rows = db.execute(SQL["stale_sessions"], {"before": before, "limit": limit})
    return [
        IdleSession(SessionKey(row["tenant"], row["session_id"]), row["version"], row["accept_seq"])
        for row in rows
    ]


def _session(row: sqlite3.Row) -> Session:
    return Session(
        session_id=row["session_id"],
        title=row["title"],
        metadata=decode_metadata(row["metadata"]),
        active_run_id=row["active_run_id"],
        waiting_runs=row["waiting_runs"],
        usage=Usage(
            row["input_tokens"],
            row["output_tokens"],
            row["cache_read_tokens"],
            row["cache_write_tokens"],
            row["requests"],
        ),
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )


def list_messages(
    db: sqlite3.Connection,
    key: SessionKey,
    after: MessagePlace | None,
    limit: int,
    max_bytes: int,
) -> Page[Message, MessagePlace]:
    """The transcript after a place."""
    turn, ordinal = (0, 0) if after is None else after
    where = {**key._asdict(), "turn": turn, "ordinal": ordinal, "limit": limit + 1}
    messages = (_message(db, key.tenant, row) for row in db.execute(SQL["messages"], where))
    page, more = fill(messages, limit=limit, max_bytes=max_bytes, size=message_size)
    return Page(tuple(page), (page[-1].turn, page[-1].ordinal) if more else None)


def _message(db: sqlite3.Connection, tenant: str, row: sqlite3.Row) -> Message:
    role = Role(row["role"])
    parts = decode_parts(row["parts"])
    if role is Role.USER:
        asked = prompt(db, RunKey(tenant, row["run_id"]))
        assert asked is not None  # noqa: S101 - a message goes with its run
        parts = prompt_parts(asked)
    reason = row["finish_reason"]
    return Message(
        message_id=row["message_id"],
        run_id=row["run_id"],
        turn=row["turn"],
        ordinal=row["ordinal"],
        role=role,
        parts=parts,
        finish_reason=None if reason is None else FinishReason(reason),
        model=row["model"],
        created_at=row["created_at"],
    )
