"""What is to be written, as rows: one unit for each call of a caller.

Encoding happens in the call, so that a unit that waits for its commit is ready to be bound.
"""

from __future__ import annotations

from asyncio import Future
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from runlane_server.core.model import (
    EXCERPT_CHARS,
    NO_USAGE,
    Message,
    Micros,
    RunComplete,
    RunEvent,
    RunKey,
    RunRequest,
    SessionKey,
)
from runlane_server.core.transition import RunChange, Transition
from runlane_server.store.base import NewSession, Position
from runlane_server.store.codec import (
    encode_body,
    encode_complete,
    encode_metadata,
    encode_parts,
    encode_usage,
)

Row: TypeAlias = dict[str, Any]
Rows: TypeAlias = Mapping[str, Sequence[Row]]
"""Rows by the name of the statement that writes them."""


@dataclass(frozen=True, slots=True)
class Removed:
    """What a compaction removed: how many terminal events, up to which position (None: no event).

    `more`: it stopped halfway, as that was enough for one transaction.
    """

    events: int
    last: Position | None
    more: bool


Result: TypeAlias = Exception | Removed | None
"""How a unit ended: why it was refused, or what it returns."""

EVENT_BYTES = 500
"""What a terminal event is taken to weigh in the file beside its body: its keys, thrice."""


@dataclass(slots=True)
class Unit:
    """What is written together or not at all.

    `lane` is the lane it changes, `changed` are the runs it changes there; `appended` is the run
    that it only adds events to.
    """

    tenant: str
    rows: Rows
    future: Future[Result]
    lane: SessionKey | None = None
    changed: frozenset[str] = frozenset()
    appended: str | None = None
    completes: tuple[RunComplete, ...] = ()
    events: Sequence[RunEvent] = ()
    first_position: int = field(default=0)


@dataclass(slots=True)
class Compaction:
    """Terminal events to be removed: up to `limit` of those that ended before, and of the oldest as
    long as the log has more than `keep_bytes`. It is a transaction of its own."""

    before: Micros
    limit: int
    keep_bytes: int | None
    future: Future[Result]


def commit_unit(base_version: int, transition: Transition, future: Future[Result]) -> Unit:
    """A transition of a lane."""
    key = transition.lane.key
    completes = transition.completes
    if transition.removed:
        rows = _removal(key, base_version)
    else:
        rows = _change(base_version, transition, completes)
    rows["insert_event"] = [_log_row(key, complete) for complete in completes]
    return Unit(
        key.tenant,
        rows,
        future,
        lane=key,
        changed=frozenset(change.run.run_id for change in transition.runs),
        completes=completes,
        events=transition.events,
    )


def append_unit(
    key: RunKey, attempt: int, events: Sequence[RunEvent], future: Future[Result]
) -> Unit:
    """Events of the active run."""
    fence = {"run_id": key.run_id, "attempt": attempt}
    rows = [_event_row(key.tenant, event) | fence for event in events]
    return Unit(
        key.tenant, {"append_run_event": rows}, future, appended=key.run_id, events=tuple(events)
    )


def session_unit(session: NewSession, future: Future[Result]) -> Unit:
    """A session without a run."""
    row = {
        "tenant": session.key.tenant,
        "session_id": session.key.session_id,
        "title": session.title,
        "metadata": encode_metadata(session.metadata),
        "created_at": session.created_at,
    }
    return Unit(session.key.tenant, {"create_session": [row]}, future, lane=session.key)


def _removal(key: SessionKey, base_version: int) -> dict[str, list[Row]]:
    row = {"tenant": key.tenant, "session_id": key.session_id}
    return {
        "delete_session": [{**row, "base_version": base_version}],
        "delete_messages": [row],
        "delete_run_events": [row],
        "delete_attachments": [row],
        "delete_prompts": [row],
        "delete_runs": [row],
    }


def _change(
    base_version: int, transition: Transition, completes: Iterable[RunComplete]
) -> dict[str, list[Row]]:
    tenant, session_id = transition.lane.key
    rows: dict[str, list[Row]] = {
        "insert_session" if base_version == 0 else "update_session": [
            _session_row(base_version, transition, completes)
        ],
        "insert_run": [],
        "update_run": [],
        "insert_prompt": [],
        "insert_attachment": [],
        "insert_message": [_message_row(tenant, session_id, it) for it in transition.messages],
        "insert_run_event": [_event_row(tenant, event) for event in transition.events],
    }
    for change in transition.runs:
        row = _run_row(tenant, session_id, change)
        if change.request is None:
            rows["update_run"].append(row)
        else:
            rows["insert_run"].append(row | _request_fields(change, change.request))
            _add_prompt(rows, tenant, change.request)
    return rows


def _session_row(
    base_version: int, transition: Transition, completes: Iterable[RunComplete]
) -> Row:
    lane = transition.lane
    usage = sum((complete.usage for complete in completes), start=NO_USAGE)
    return {
        "tenant": lane.key.tenant,
        "session_id": lane.key.session_id,
        "base_version": base_version,
        "version": lane.version,
        "accept_seq": lane.accept_seq,
        "turn": lane.turn,
        "active_run_id": "" if lane.active is None else lane.active.run_id,
        "waiting_runs": len(lane.waiting),
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cache_read_tokens": usage.cache_read_tokens,
        "cache_write_tokens": usage.cache_write_tokens,
        "requests": usage.requests,
        # A cancel of the active run has no event; it leaves the time as it is.
        "at": max((event.at for event in transition.events), default=0),
    }


def _run_row(tenant: str, session_id: str, change: RunChange) -> Row:
    run, complete = change.run, change.complete
    row: Row = {
        "tenant": tenant,
        "run_id": run.run_id,
        "session_id": session_id,
        "state": run.state,
        "rank": run.rank,
        "turn": run.turn,
        "attempt": run.attempt,
        "started_at": run.started_at,
        "folded_into": run.folded_into,
        "cancel_reason": run.cancel_reason,
        "ended_at": None,
        "finish_reason": None,
        "error_reason": None,
        "error_message": None,
        "message_id": None,
        "usage": None,
    }
    if complete is not None:
        row["ended_at"] = complete.ended_at
        row["finish_reason"] = complete.finish_reason
        row["message_id"] = complete.message_id
        row["usage"] = encode_usage(complete.usage)
        if complete.error is not None:
            row["error_reason"] = complete.error.reason
            row["error_message"] = complete.error.message
    return row


def _request_fields(change: RunChange, request: RunRequest) -> Row:
    return {
        "accept_seq": change.run.accept_seq,
        "when_busy": change.run.when_busy,
        "timeout": change.run.timeout,
        "max_attempts": change.run.max_attempts,
        "accepted_at": change.run.accepted_at,
        "metadata": encode_metadata(request.metadata),
        "attachments": len(request.prompt.attachments),
        "prompt_fingerprint": request.prompt.fingerprint,
        "prompt_head": request.prompt.excerpt,
    }


def _add_prompt(rows: dict[str, list[Row]], tenant: str, request: RunRequest) -> None:
    """What of a prompt is kept beside the row of its run."""
    key = {"tenant": tenant, "run_id": request.run_id}
    rest = request.prompt.text[EXCERPT_CHARS:]
    if rest:
        rows["insert_prompt"].append({**key, "rest": rest})
    rows["insert_attachment"] += (
        {**key, "n": n, "name": it.name, "mime_type": it.mime_type, "content": it.content}
        for n, it in enumerate(request.prompt.attachments)
    )


def _message_row(tenant: str, session_id: str, message: Message) -> Row:
    return {
        "tenant": tenant,
        "session_id": session_id,
        "turn": message.turn,
        "ordinal": message.ordinal,
        "message_id": message.message_id,
        "run_id": message.run_id,
        "role": message.role,
        "finish_reason": message.finish_reason,
        "model": message.model,
        "created_at": message.created_at,
        "parts": encode_parts(message.parts),
    }


def _event_row(tenant: str, event: RunEvent) -> Row:
    kind, body = encode_body(event.body)
    return {
        "tenant": tenant,
        "run_id": event.run_id,
        "idx": event.index,
        "at": event.at,
        "kind": kind,
        "body": body,
    }


def _log_row(key: SessionKey, complete: RunComplete) -> Row:
    body = encode_complete(complete)
    return {
        "position": None,  # given by the writer
        "tenant": key.tenant,
        "session_id": key.session_id,
        "run_id": complete.run_id,
        "ended_at": complete.ended_at,
        "bytes": EVENT_BYTES + len(body.encode()),
        "body": body,
    }
