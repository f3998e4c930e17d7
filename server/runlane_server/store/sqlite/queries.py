"""The reads of a store in a SQLite file, as functions on a connection.

Each runs in the reader's thread, without interruption.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from shutil import disk_usage
from typing import Any

from runlane_server.core.input import InputRequest, InputState
from runlane_server.core.model import (
    Attachment,
    KeptPart,
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
    DueInput,
    IdleSession,
    MessagePlace,
    Page,
)
from runlane_server.store.corrupt import corrupt_complete
from runlane_server.store.inputs import decode_asking, due_inputs, input_from, inputs_page
from runlane_server.store.lane_log import LaneEntry, LanePage, LanePlace
from runlane_server.store.paging import (
    check_not_compacted,
    entry_size,
    event_size,
    message_size,
    messages_page,
    take_page,
)
from runlane_server.store.records import (
    END_OF_LIST,
    NO_ANSWER,
    Answer,
    answer_from,
    assemble_lane,
    deleted_run_from,
    entry_from,
    event_from,
    lane_from,
    message_from,
    prompt_from,
    readable_keys,
    run_from,
    session_from,
    with_retry,
)
from runlane_server.store.sqlite.connection import as_is
from runlane_server.store.sqlite.copies import copied_messages
from runlane_server.store.sqlite.transaction import SQL
from runlane_server.store.vitals import StoreVitals
from runlane_server.store.weight import SESSION_BYTES

# --- Lanes --------------------------------------------------------------------------------------


def lane(db: sqlite3.Connection, key: SessionKey) -> Lane:
    """The lane of a session. Raises CorruptRecord."""
    rows = db.execute(SQL["lane"], key).fetchall()
    if not rows:
        return Lane(
            key, is_being_removed=bool(db.execute(SQL["is_being_removed"], key).fetchone()[0])
        )
    return lane_from(key, lambda: _lane(key, rows))


def lane_version(db: sqlite3.Connection, key: SessionKey) -> int:
    """The version of a lane; 0 if there is no session."""
    row = db.execute(SQL["lane_version"], key).fetchone()
    return 0 if row is None else int(row["version"])


def _lane(key: SessionKey, rows: Sequence[sqlite3.Row]) -> Lane:
    version, accept_seq, turn, agent = rows[0][:4]
    runs = [_lane_run(*tuple(row)[4:]) for row in rows if row["run_id"] is not None]
    runs.sort(key=lambda run: run.accept_seq)
    return assemble_lane(
        key, version=version, accept_seq=accept_seq, turn=turn, agent=agent, runs=runs
    )


def _lane_run(run_id: str, accept_seq: int, state: str, when_busy: str, *rest: Any) -> LaneRun:
    *others, asking, retry, revision, last_update = rest
    run = LaneRun(run_id, accept_seq, RunState(state), WhenBusy(when_busy), *others)
    if revision:
        run = run._replace(revision=revision, last_update=last_update)
    run = run if asking is None else run._replace(asking=decode_asking(asking))
    return with_retry(run, retry)


def busy_sessions(db: sqlite3.Connection) -> list[BusySession]:
    """All sessions with open runs, the longest waiting first."""
    return [
        BusySession(key, bool(row["active"]), row["waiting_runs"], row["agent"], bool(row["asks"]))
        for row, key in readable_keys(db.execute(SQL["busy_sessions"]), as_is)
    ]


def unended_runs(db: sqlite3.Connection, key: SessionKey, at: Micros) -> list[RunComplete]:
    """The placeholders of the terminal events of a session's open runs."""
    return [
        corrupt_complete(key.session_id, row["run_id"], accept_seq=row["accept_seq"], ended_at=at)
        for row in db.execute(SQL["unended_runs"], key._asdict())
    ]


# --- Runs ---------------------------------------------------------------------------------------


def run(db: sqlite3.Connection, key: RunKey) -> Run | None:
    """A run; if it has ended, with the text of its RunComplete."""
    number = db.execute(SQL["run_no"], key).fetchone()
    if number is None:
        return None
    row = db.execute(SQL["run"], dict(number)).fetchone()
    if row["is_removed"]:
        return None
    return run_from(key.tenant, row, as_is, lambda: _answer(db, key.tenant, row))


def deleted_run(db: sqlite3.Connection, key: RunKey) -> DeletedRun | None:
    """A run whose session was deleted."""
    row = db.execute(SQL["deleted_run"], key._asdict()).fetchone()
    return None if row is None else deleted_run_from(key, row, as_is)


def has_removals(db: sqlite3.Connection) -> bool:
    """Whether something that was deleted is still to be removed."""
    return bool(db.execute(SQL["has_removals"]).fetchone()[0])


def count_deleted(db: sqlite3.Connection, before: Micros, limit: int) -> int:
    """The number of runs deleted before a time, up to a limit."""
    return len(db.execute(SQL["deleted_before"], (before, limit)).fetchall())


def _answer(db: sqlite3.Connection, tenant: str, row: sqlite3.Row) -> Answer:
    """The parts of the last message that a RunComplete has.

    Empty while the run is open, and for a run without a message."""
    if not row["message_id"]:
        return NO_ANSWER
    where = {
        "tenant": tenant,
        "session_id": row["session_id"],
        "turn": row["turn"],
        "message_id": row["message_id"],
    }
    message = db.execute(SQL["message_parts"], where).fetchone()
    return answer_from(tenant, row["message_id"], message["parts"])


def prompt(db: sqlite3.Connection, key: RunKey) -> Prompt | None:
    """The full prompt of a run."""
    row = db.execute(SQL["prompt"], key).fetchone()
    if row is None:
        return None
    return prompt_from(key, lambda: _prompt(db, key, row))


def _prompt(db: sqlite3.Connection, key: RunKey, row: sqlite3.Row) -> Prompt:
    attachments = db.execute(SQL["attachments"], key).fetchall() if row["attachments"] else []
    if len(attachments) != row["attachments"]:
        raise ValueError(f"has {len(attachments)} attachments instead of {row['attachments']}")
    return Prompt(
        row["prompt_head"] + (row["rest"] or ""),
        tuple(Attachment(it["name"], it["mime_type"], it["content"]) for it in attachments),
    )


def run_events(
    db: sqlite3.Connection, key: RunKey, after: int, limit: int, max_bytes: int
) -> list[RunEvent]:
    """The events of a run after an index."""
    where = {**key._asdict(), "after": after, "limit": limit}
    # An open cursor would keep later reads at its snapshot, and an error holds its frame for long.
    with closing(db.execute(SQL["run_events"], where)) as rows:
        events = (_run_event(db, key, row) for row in rows)
        page, _ = take_page(events, limit=limit, max_bytes=max_bytes, size=event_size)
    check_not_compacted(page, after)
    return page


def _run_event(db: sqlite3.Connection, key: RunKey, row: sqlite3.Row) -> RunEvent:
    def complete() -> RunComplete:
        ended = run(db, key)
        if ended is None or ended.complete is None:
            raise ValueError("the run has not ended")
        return ended.complete

    return event_from(key, row, complete)


def lane_events(
    db: sqlite3.Connection, key: SessionKey, after: LanePlace, limit: int, max_bytes: int
) -> LanePage:
    """The events of a session after a place in the log of its lane."""
    where = {**key._asdict(), "after": after, "limit": limit}
    session = db.execute(SQL["lane_start"], key._asdict()).fetchone()
    if session is None:
        return LanePage()

    def entry(row: sqlite3.Row) -> LaneEntry:
        run_key = RunKey(key.tenant, row["run_id"])
        return entry_from(row, lambda: _run_event(db, run_key, row))

    with closing(db.execute(SQL["lane_events"], where)) as rows:
        page, _ = take_page(map(entry, rows), limit=limit, max_bytes=max_bytes, size=entry_size)
    return LanePage(tuple(page), session["start"] or 0, session["created_at"])


# --- Input requests -----------------------------------------------------------------------------


def input_request(db: sqlite3.Connection, tenant: str, name: str) -> InputRequest | None:
    """An input request."""
    row = db.execute(SQL["input"], (tenant, name)).fetchone()
    return None if row is None else input_from(tenant, row, as_is)


def find_input(db: sqlite3.Connection, key: RunKey, question_key: str) -> InputRequest | None:
    """The input request of a run with this key."""
    row = db.execute(SQL["input_of_run"], (*key, question_key)).fetchone()
    return None if row is None else input_from(key.tenant, row, as_is)


def list_inputs(
    db: sqlite3.Connection,
    tenant: str,
    *,
    session_id: str | None,
    run_id: str | None,
    states: Collection[InputState],
    after: int | None,
    limit: int,
) -> Page[InputRequest, int]:
    """A page of input requests, the latest first."""
    where = {
        "tenant": tenant,
        "session_id": session_id,
        "run_id": run_id,
        "states": json.dumps([*(states or InputState)]),
        "before": END_OF_LIST if after is None else after,
        "limit": limit + 1,
    }
    if run_id is not None:
        name = "inputs_of_run"
    elif session_id is not None:
        name = "inputs_of_session"
    else:
        name = "open_inputs" if {*states} == {InputState.OPEN} else "inputs"
    return inputs_page(tenant, db.execute(SQL[name], where).fetchall(), as_is, limit)


def due_input_requests(db: sqlite3.Connection, now: Micros, limit: int) -> list[DueInput]:
    """Open requests whose time is over, the longest due first."""
    return due_inputs(db.execute(SQL["due_inputs"], (now, limit)), as_is)


# --- Sessions -----------------------------------------------------------------------------------


def session(db: sqlite3.Connection, key: SessionKey) -> Session | None:
    """A session."""
    row = db.execute(SQL["session"], key._asdict()).fetchone()
    return None if row is None else session_from(key.tenant, row, as_is)


def stored_bytes(db: sqlite3.Connection, tenant: str, after: int, limit: int) -> tuple[int, int]:
    """The stored bytes of up to `limit` of a tenant's sessions, and the place of the last of them;
    0 if there are no more."""
    bytes_, found, last = db.execute(SQL["stored_bytes"], (tenant, after, limit)).fetchone()
    return bytes_ + SESSION_BYTES * found, last if found == limit else 0


def stale_sessions(db: sqlite3.Connection, before: Micros, limit: int) -> list[IdleSession]:
    """Idle sessions whose last write was before `before`, the oldest first."""
    rows = db.execute(SQL["stale_sessions"], {"before": before, "limit": limit})
    return [
        IdleSession(key, row["version"], row["accept_seq"])
        for row, key in readable_keys(rows, as_is)
    ]


def list_messages(
    db: sqlite3.Connection,
    key: SessionKey,
    after: MessagePlace | None,
    limit: int,
    max_bytes: int,
    *,
    run_id: str | None,
) -> Page[Message, MessagePlace]:
    """A page of the transcript after a place."""
    turn, ordinal = after or (0, 0)
    where = {**key._asdict(), "turn": turn, "ordinal": ordinal, "limit": limit + 1}
    name = "messages"
    if run_id is not None:
        name = "messages_of_run"
        where["run_id"] = run_id
    copied = copied_messages(db, key, (turn, ordinal), limit + 1, run_id)
    with closing(copied), closing(db.execute(SQL[name], where)) as rows:
        messages = chain(copied, (_message(db, key.tenant, row) for row in rows))
        page, more = take_page(messages, limit=limit, max_bytes=max_bytes, size=message_size)
    return messages_page(page, more=more)


def _message(db: sqlite3.Connection, tenant: str, row: sqlite3.Row) -> Message:
    def read_prompt() -> Prompt:
        asked = prompt(db, RunKey(tenant, row["run_id"]))
        if asked is None:
            raise ValueError("its run is not there")
        return asked

    def read_kept(place: KeptPart) -> str | None:
        return kept_part(db, tenant, row["run_id"], place)

    return message_from(tenant, row, as_is, read_prompt, read_kept)


def kept_part(db: sqlite3.Connection, tenant: str, run_id: str, place: KeptPart) -> str | None:
    """An encoded part that was stored before its message; None if it is not there."""
    row = db.execute(SQL["kept_part"], (tenant, run_id, place.attempt, place.number)).fetchone()
    return None if row is None else row["part"]


def vitals(db: sqlite3.Connection, path: Path) -> StoreVitals:
    """The vital signs of the store in this file."""
    files = (Path(f"{path}{beside}") for beside in ("", "-wal"))
    size = sum(file.stat().st_size for file in files if file.exists())
    row = db.execute(SQL["vitals"]).fetchone()
    return StoreVitals(
        size=size,
        free=disk_usage(path.absolute().parent).free,
        waiting_since=row["waiting_since"],
        asking_since=row["asking_since"],
    )
