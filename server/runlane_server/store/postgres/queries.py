"""What rows of the database stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from runlane_server.core.model import (
    Attachment,
    FinishReason,
    Message,
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
from runlane_server.store.base import BusySession, LoggedComplete, Page
from runlane_server.store.codec import (
    RUN_COMPLETE,
    decode_body,
    decode_complete,
    decode_metadata,
    decode_parts,
    decode_usage,
)
from runlane_server.store.paging import (
    check_kept,
    complete_size,
    complete_text,
    event_size,
    fill,
    message_size,
    prompt_parts,
)
from runlane_server.store.postgres.text import unescape

Record: TypeAlias = Mapping[str, Any]
Records: TypeAlias = Sequence[Record]

Item = TypeVar("Item")

END_OF_LIST = (1 << 63) - 1
OPEN = frozenset(state for state in RunState if not state.is_terminal)

SLACK_BYTES = 4_096
"""How much more is read than asked for: what `fill` takes an item to weigh is not what its row
has."""


def _page(
    rows: Records,
    decode: Callable[[Record], Item],
    *,
    limit: int,
    max_bytes: int,
    size: Callable[[Item], int],
) -> tuple[list[Item], bool]:
    """The items of a page, and whether there are more. `found` says how many there were to read."""
    page, more = fill(map(decode, rows), limit=limit, max_bytes=max_bytes, size=size)
    return page, more or (bool(rows) and rows[0]["found"] > len(rows))


# --- Lanes --------------------------------------------------------------------------------------


def lane(key: SessionKey, rows: Records) -> Lane:
    """The lane of a session, of a row for each of its open runs."""
    if not rows:
        return Lane(key)
    runs = [_lane_run(row) for row in rows if row["run_id"] is not None]
    folded = [run for run in runs if run.folded_into]
    waiting = [run for run in runs if run.state in {RunState.ACCEPTED, RunState.QUEUED}]
    active = [run for run in runs if run not in folded and run not in waiting]
    return Lane(
        key,
        version=rows[0]["version"],
        accept_seq=rows[0]["lane_accept_seq"],
        turn=rows[0]["lane_turn"],
        active=active[0] if active else None,
        folded=tuple(folded),
        waiting=tuple(sorted(waiting, key=lambda run: run.rank)),
    )


def _lane_run(row: Record) -> LaneRun:
    return LaneRun(
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
    )


def key_of(row: Record) -> SessionKey:
    """Which session a row is of."""
    return SessionKey(unescape(row["tenant"]), unescape(row["session_id"]))


def busy_session(row: Record) -> BusySession:
    """A session with open runs."""
    return BusySession(key_of(row), row["active"], row["waiting_runs"])


# --- Runs ---------------------------------------------------------------------------------------


def whole_run(row: Record) -> Run:
    """A run with the text of its end."""
    if not row["message_id"]:
        return run(row)
    return run(row, *complete_text(decode_parts(row["parts"])))


def run(row: Record, text: str = "", text_truncated: bool = False) -> Run:
    """A run, with that text for the one of its end."""
    state = RunState(row["state"])
    return Run(
        session_id=unescape(row["session_id"]),
        run_id=unescape(row["run_id"]),
        accept_seq=row["accept_seq"],
        state=state,
        when_busy=WhenBusy(row["when_busy"]),
        prompt_excerpt=unescape(row["prompt_head"]),
        prompt_fingerprint=row["prompt_fingerprint"],
        metadata=decode_metadata(row["metadata"]),
        timeout=row["timeout"],
        max_attempts=row["max_attempts"],
        attempt=row["attempt"],
        accepted_at=row["accepted_at"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        folded_into=unescape(row["folded_into"]),
        complete=_complete(row, text, text_truncated) if state.is_terminal else None,
    )


def _complete(row: Record, text: str, text_truncated: bool) -> RunComplete:
    reason = row["error_reason"]
    error = None if reason is None else RunError(unescape(reason), unescape(row["error_message"]))
    return RunComplete(
        session_id=unescape(row["session_id"]),
        run_id=unescape(row["run_id"]),
        accept_seq=row["accept_seq"],
        state=RunState(row["state"]),
        finish_reason=FinishReason(row["finish_reason"]),
        message_id=unescape(row["message_id"]),
        text=text,
        text_truncated=text_truncated,
        error=error,
        folded_into=unescape(row["folded_into"]),
        usage=decode_usage(row["usage"]),
        attempt=row["attempt"],
        cancel_reason=unescape(row["cancel_reason"]),
        accepted_at=row["accepted_at"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
    )


def runs_page(rows: Records, limit: int) -> Page[Run, int]:
    """A page of runs, of `limit` rows and one more."""
    place = rows[limit - 1]["run_no"] if rows[limit:] else None
    return Page(tuple(run(row) for row in rows[:limit]), place)


def prompt(row: Record) -> Prompt:
    """The prompt of a run, whole."""
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
    """The events of a run after an index; `end` is what its last one tells, if it is among them."""

    def decode(row: Record) -> RunEvent:
        if row["kind"] != RUN_COMPLETE:
            body = decode_body(row["kind"], row["body"])
            return RunEvent(key.run_id, row["idx"], row["at"], body)
        assert end is not None  # noqa: S101 - the caller has read it
        return RunEvent(key.run_id, row["idx"], row["at"], end)

    page, _ = _page(rows, decode, limit=limit, max_bytes=max_bytes, size=event_size)
    check_kept(page, after)
    return page


# --- Sessions -----------------------------------------------------------------------------------


def session(row: Record) -> Session:
    """A session."""
    return Session(
        session_id=unescape(row["session_id"]),
        title=unescape(row["title"]),
        metadata=decode_metadata(row["metadata"]),
        active_run_id=unescape(row["active_run_id"]),
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


def sessions_page(rows: Records, limit: int) -> Page[Session, int]:
    """A page of sessions, of `limit` rows and one more."""
    place = rows[limit - 1]["created_no"] if rows[limit:] else None
    return Page(tuple(session(row) for row in rows[:limit]), place)


def messages_page(rows: Records, *, limit: int, max_bytes: int) -> Page[Message, tuple[int, int]]:
    """A page of a transcript."""
    page, more = _page(rows, _message, limit=limit, max_bytes=max_bytes, size=message_size)
    return Page(tuple(page), (page[-1].turn, page[-1].ordinal) if more else None)


def _message(row: Record) -> Message:
    role = Role(row["role"])
    reason = row["finish_reason"]
    return Message(
        message_id=unescape(row["message_id"]),
        run_id=unescape(row["run_id"]),
        turn=row["turn"],
        ordinal=row["ordinal"],
        role=role,
        parts=prompt_parts(prompt(row)) if role is Role.USER else decode_parts(row["parts"]),
        finish_reason=None if reason is None else FinishReason(reason),
        model=unescape(row["model"]),
        created_at=row["created_at"],
    )


# --- The event log ------------------------------------------------------------------------------


def log_page(
    tenant: str, rows: Records, *, limit: int, max_bytes: int
) -> tuple[list[LoggedComplete], bool]:
    """Terminal events of a tenant, and whether there are more of them."""
    found = [row for row in rows if row["position"] is not None]

    def decode(row: Record) -> LoggedComplete:
        return LoggedComplete(row["position"], tenant, decode_complete(row["body"]))

    return _page(found, decode, limit=limit, max_bytes=max_bytes, size=complete_size)
