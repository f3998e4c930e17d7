"""The rows of a write to a SQLite file: one unit for each call of the store.

A unit is encoded in the call, so that its rows are ready when its batch is written.
"""

from __future__ import annotations

import sqlite3
from asyncio import Future
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from runlane_server.core.input import InputChange, InputState
from runlane_server.core.model import (
    EXCERPT_CHARS,
    NO_USAGE,
    Message,
    Micros,
    Part,
    Prompt,
    RunComplete,
    RunEvent,
    RunKey,
    RunRequest,
    Session,
    SessionKey,
)
from runlane_server.core.transition import LaneRun, RunChange, Transition
from runlane_server.core.update import RunContent
from runlane_server.store.base import NewSession, Position
from runlane_server.store.codec import (
    encode_body,
    encode_complete,
    encode_metadata,
    encode_part,
    encode_parts,
    encode_retry,
    encode_usage,
)
from runlane_server.store.inputs import (
    encode_answer,
    encode_asking,
    encode_question,
    input_weight,
)
from runlane_server.store.lane_log import LaneChange, entries_of
from runlane_server.store.sqlite.removal import remove_first, remove_next
from runlane_server.store.weight import (
    kept_weight,
    logged_event_weight,
    message_weight,
    run_weight,
    session_growth,
    session_weight,
)

Row: TypeAlias = tuple[Any, ...]
"""The parameters of a statement, in their order.

Enumerations are plain strings here: for any other type sqlite3 searches for an adapter first.
"""

_BODY = 3
"""The place of the body in the row of an event."""

Rows: TypeAlias = dict[str, list[Row]]
"""Rows, by the name of the statement that writes them."""


@dataclass(frozen=True, slots=True)
class CompactionStep:
    """The outcome of one transaction of a compaction.

    It removed `events` terminal events, of each tenant up to the position in `compacted`. `more`:
    it reached the limit of one transaction, and more events are due.
    """

    events: int
    compacted: Mapping[str, Position]
    more: bool


Result: TypeAlias = Exception | CompactionStep | None
"""The outcome of a unit: the reason of a refusal, or the value to return."""


@dataclass(slots=True)
class Unit:
    """Rows that are written together or not at all. See `batching.WriteUnit`.

    `removes` removes a piece of what was deleted, after these rows were written.

    `logged` are the rows of its terminal events, and `inputs` those of its input requests, without
    their positions. `size` is roughly that of
    its texts, in characters.
    """

    tenant: str
    rows: Rows
    future: Future[Result]
    lane: SessionKey | None = None
    changed: Sequence[str] = ()
    appended: str | None = None
    completes: tuple[RunComplete, ...] = ()
    logged: Sequence[Row] = ()
    inputs: Sequence[Row] = ()
    events: Sequence[RunEvent] = ()
    lane_change: LaneChange | None = None
    first_position: int = field(default=0)
    size: int = 0
    removes: Callable[[sqlite3.Connection], None] | None = None


@dataclass(slots=True)
class Compaction:
    """A request to remove old terminal events, in a transaction of its own. See `Store.compact`."""

    before: Micros
    limit: int
    keep_bytes: int | None
    future: Future[Result]


def commit_unit(base_version: int, transition: Transition, future: Future[Result]) -> Unit:
    """The unit of a transition."""
    key = transition.lane.key
    completes = transition.completes
    if transition.removed:
        rows: Rows = {"delete_session": [(*key, base_version)], "begin_removal": [key]}
    else:
        rows = _change(base_version, transition, completes)
    return Unit(
        key.tenant,
        rows,
        future,
        lane=key,
        changed=[change.run.run_id for change in transition.runs],
        completes=completes,
        logged=[_log_row(key, complete) for complete in completes],
        inputs=_new_inputs(key, transition.inputs),
        events=transition.events,
        lane_change=LaneChange(
            key,
            base_version,
            0 if transition.removed else transition.lane.version,
            transition.events,
        ),
        size=sum([len(row[-1] or "") for row in rows.get("insert_message", ())]),
        removes=partial(remove_first, key=key, has_open_runs=False) if transition.removed else None,
    )


def discard_unit(key: SessionKey, completes: Sequence[RunComplete], future: Future[Result]) -> Unit:
    """The unit of the removal of a session at any version."""
    return Unit(
        key.tenant,
        {"discard_session": [key], "begin_removal": [key]},
        future,
        lane=key,
        changed=[complete.run_id for complete in completes],
        completes=tuple(completes),
        logged=[_log_row(key, complete) for complete in completes],
        lane_change=LaneChange(key, 0, 0),
        removes=partial(remove_first, key=key, has_open_runs=True),
    )


def append_unit(
    key: RunKey, attempt: int, events: Sequence[RunEvent], future: Future[Result]
) -> Unit:
    """The unit of events of the active run."""
    rows = [(*_event_values(event), *key, attempt) for event in events]
    return Unit(
        key.tenant,
        {"append_run_event": rows},
        future,
        appended=key.run_id,
        events=tuple(events),
        size=sum([len(row[_BODY] or "") for row in rows]),
    )


def keep_unit(key: RunKey, attempt: int, number: int, part: Part, future: Future[Result]) -> Unit:
    """The unit of a part that is stored before its message."""
    text = encode_part(part)
    rows: Rows = {"keep_part": [(number, text, *key, attempt)]}
    if number == 0 and attempt > 1:
        rows["drop_kept_parts"] = [(*key, attempt)]
    return Unit(key.tenant, rows, future, appended=key.run_id, size=len(text))


def session_unit(session: NewSession, future: Future[Result]) -> Unit:
    """The unit of a new session without a run."""
    at = session.created_at
    weight = session_weight(session.title, session.metadata)
    labels = encode_metadata(session.metadata)
    row = (*session.key, session.title, labels, session.agent, weight, at, at)
    return Unit(
        session.key.tenant,
        {"create_session": [row]},
        future,
        lane=session.key,
        lane_change=LaneChange(session.key, 0, 1),
    )


def edit_unit(
    base_version: int, key: SessionKey, before: Session, after: Session, future: Future[Result]
) -> Unit:
    """The unit of a session that a caller has changed."""
    version = base_version + 1
    row = (
        version,
        after.title,
        encode_metadata(after.metadata),
        after.agent,
        session_growth(before, after),
        after.updated_at,
        *key,
        base_version,
        before.title,
        encode_metadata(before.metadata),
        before.agent,
    )
    return Unit(
        key.tenant,
        {"edit_session": [row]},
        future,
        lane=key,
        lane_change=LaneChange(key, base_version, version),
    )


def forget_unit(before: Micros, limit: int, future: Future[Result]) -> Unit:
    """The unit that forgets runs deleted long ago."""
    return Unit("", {"forget_deleted": [(before, limit)]}, future)


def removal_unit(future: Future[Result]) -> Unit:
    """The unit that removes a piece of what was deleted."""
    return Unit("", {}, future, removes=remove_next)


def _change(base_version: int, transition: Transition, completes: Sequence[RunComplete]) -> Rows:
    key = transition.lane.key
    rows: Rows = {}
    added = 0
    for change in transition.runs:
        _add_run(rows, key, change)
        if change.request is not None:
            added += run_weight(change.request)
        if change.edit is not None:
            added += change.edit.growth
    if transition.messages:
        messages = [_message_row(key, it) for it in transition.messages]
        rows["insert_message"] = messages
        added += message_weight([row[-1] for row in messages])
        added += kept_weight(transition.messages)
    if transition.inputs:
        _close_inputs(rows, key, transition.inputs)
        added += input_weight(transition.inputs)
    values = _session_values(transition, completes, added)
    if base_version == 0:
        rows["insert_session"] = [(*values, values[-1], *key)]
    else:
        rows["update_session"] = [(*values, *key, base_version)]
    if transition.events:
        rows["insert_run_event"] = [
            (*_event_values(it), key.tenant, it.run_id) for it in transition.events
        ]
        rows["insert_lane_event"] = [
            (*key, entry.place, entry.event.run_id, entry.event.index)
            for entry in entries_of(transition.lane.version, transition.events)
        ]
    return rows


def _session_values(transition: Transition, completes: Sequence[RunComplete], added: int) -> Row:
    lane = transition.lane
    usage = NO_USAGE
    for complete in completes:
        usage = usage + complete.usage
    return (
        lane.version,
        lane.accept_seq,
        lane.turn,
        "" if lane.active is None else lane.active.run_id,
        len(lane.waiting),
        usage.input_tokens,
        usage.output_tokens,
        usage.cache_read_tokens,
        usage.cache_write_tokens,
        usage.requests,
        added,
        # A cancel of the active run has no event and leaves the time unchanged.
        max([event.at for event in transition.events], default=0),
    )


def _add_run(rows: Rows, key: SessionKey, change: RunChange) -> None:
    run, request, complete = change[:3]
    values = (
        run.state._value_,
        run.rank,
        run.turn,
        run.attempt,
        run.started_at,
        run.folded_into,
        run.cancel_reason,
        encode_asking(run.asking),
        key.tenant,
        run.run_id,
        key.session_id,
    )
    content = None if change.edit is None else change.edit.content
    if request is not None:
        rows.setdefault("insert_run", []).append(
            values + _request_values(change, request) + (key.tenant, run.run_id)
        )
        if content is None:
            _add_prompt(rows, RunKey(key.tenant, run.run_id), request.prompt)
    if complete is not None:
        rows.setdefault("end_run", []).append(_end_values(complete) + values)
    elif request is None:
        rows.setdefault("update_run", []).append(values)
    if run.retry is not None:
        retry = (encode_retry(run), key.tenant, run.run_id)
        rows.setdefault("set_retry", []).append(retry)
    if change.edit is not None:
        _add_edit(rows, RunKey(key.tenant, run.run_id), run, content)


def _add_edit(rows: Rows, key: RunKey, run: LaneRun, content: RunContent | None) -> None:
    """Adds the rows of an update of a run while it waited."""
    revision = (run.when_busy._value_, run.revision, run.last_update, *key)
    rows.setdefault("set_revision", []).append(revision)
    if content is None:
        return
    prompt, labels = content
    row = (prompt.excerpt, len(prompt.attachments), encode_metadata(labels), *key)
    rows.setdefault("edit_run", []).append(row)
    rows.setdefault("delete_prompt", []).append(key)
    rows.setdefault("delete_attachments_of", []).append(key)
    _add_prompt(rows, key, prompt)


def _request_values(change: RunChange, request: RunRequest) -> Row:
    run, prompt = change.run, request.prompt
    return (
        run.accept_seq,
        run.when_busy._value_,
        run.timeout,
        run.max_attempts,
        run.accepted_at,
        encode_metadata(request.metadata),
        len(prompt.attachments),
        request.fingerprint,
        prompt.excerpt,
        request.trace or None,
        run.agent,
    )


def _end_values(complete: RunComplete) -> Row:
    error = complete.error
    return (
        complete.ended_at,
        complete.finish_reason._value_,
        None if error is None else error.reason,
        None if error is None else error.message,
        complete.message_id,
        encode_usage(complete.usage),
    )


def _add_prompt(rows: Rows, key: RunKey, prompt: Prompt) -> None:
    """Adds the rows of a prompt besides that of its run."""
    rest = prompt.text[EXCERPT_CHARS:]
    if rest:
        rows.setdefault("insert_prompt", []).append((*key, rest))
    if prompt.attachments:
        rows.setdefault("insert_attachment", []).extend(
            (*key, n, it.name, it.mime_type, it.content) for n, it in enumerate(prompt.attachments)
        )


def _close_inputs(rows: Rows, key: SessionKey, changes: Sequence[InputChange]) -> None:
    for change in changes:
        if change.request is None:
            row: Row = (*_end_of_input(change), key.tenant, change.input_request_id)
            rows.setdefault("close_input", []).append(row)


def _new_inputs(key: SessionKey, changes: Sequence[InputChange]) -> Sequence[Row]:
    return [
        (
            *(key.tenant, change.input_request_id, key.session_id, request.run_id),
            *(request.question.key, change.state._value_, request.requested_at),
            *(request.expires_at, *_end_of_input(change)[1:], encode_question(request.question)),
        )
        for change in changes
        if (request := change.request) is not None
    ]


def _end_of_input(change: InputChange) -> Row:
    closed_at = None if change.state is InputState.OPEN else change.at
    return change.state._value_, closed_at, encode_answer(change.answer)


def _message_row(key: SessionKey, message: Message) -> Row:
    reason = message.finish_reason
    return (
        key.tenant,
        key.session_id,
        message.turn,
        message.ordinal,
        message.message_id,
        message.run_id,
        message.role._value_,
        None if reason is None else reason._value_,
        message.model,
        message.created_at,
        encode_parts(message.parts),
    )


def _event_values(event: RunEvent) -> Row:
    kind, body = encode_body(event.body)
    return event.index, event.at, kind, body


def _log_row(key: SessionKey, complete: RunComplete) -> Row:
    body = encode_complete(complete)
    tenant, run_id = key.tenant, complete.run_id
    size = logged_event_weight(body)
    return tenant, key.session_id, run_id, complete.ended_at, body, size
