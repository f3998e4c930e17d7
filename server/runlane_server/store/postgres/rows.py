"""The rows of a write to PostgreSQL: one unit for each call of the store.

A unit is encoded in the call, so that its rows are ready when its batch is sent. Their fields are
those of the types in `postgres/sql/0002_commit.sql` and later files.
"""

from __future__ import annotations

from asyncio import Future
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from runlane_server.core.input import NO_INPUT, InputChange, InputState
from runlane_server.core.model import (
    EXCERPT_CHARS,
    NO_USAGE,
    Attachment,
    Message,
    Prompt,
    RunComplete,
    RunEvent,
    RunKey,
    RunRequest,
    RunState,
    SessionKey,
)
from runlane_server.core.transition import LaneRun, RunChange, Transition
from runlane_server.core.update import RunContent
from runlane_server.store.base import NewSession
from runlane_server.store.codec import (
    encode_body,
    encode_complete,
    encode_metadata,
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
from runlane_server.store.postgres.text import escape
from runlane_server.store.weight import (
    kept_weight,
    logged_event_weight,
    message_weight,
    run_weight,
    session_weight,
)

Row: TypeAlias = tuple[Any, ...]

PARAMETERS = (
    "new_lanes",
    "changed_lanes",
    "removed_lanes",
    "new_runs",
    "changed_runs",
    "new_prompts",
    "new_attachments",
    "new_messages",
    "new_run_events",
    "fences",
    "new_events",
    "new_inputs",
    "closed_inputs",
    "asking_runs",
    "retried_runs",
    "new_lane_events",
    "updated_runs",
    "edited_prompts",
    "edited_attachments",
)
"""The parameters of `commit_fenced`, in order."""

NUMBERED = frozenset(
    {"new_lanes", "changed_lanes", "removed_lanes", "new_runs", "fences", "new_lane_events"}
)
"""Rows that begin with the number of their unit, so that a refusal can name the unit."""

_HOSTED = frozenset({RunState.ACTIVE, RunState.INPUT_REQUIRED, RunState.CANCELLING})

ROW_BYTES = 200
"""The assumed size of a row in a batch, besides its last field."""

Result: TypeAlias = Exception | None
"""The outcome of a unit: the reason of a refusal, or None."""


@dataclass(slots=True)
class Unit:
    """Rows that are written together or not at all. See `batching.WriteUnit`.

    `size` is its approximate size in bytes. `versions_skipped` is set by the write: the last
    version of a removed session with the same id, which the new lane continues, or 0.
    """

    tenant: str
    rows: dict[str, list[Row]]
    future: Future[Result]
    lane: SessionKey | None = None
    changed: frozenset[str] = frozenset()
    appended: str | None = None
    created: bool = False
    completes: tuple[RunComplete, ...] = ()
    events: Sequence[RunEvent] = ()
    size: int = 0
    versions_skipped: int = 0
    lane_change: LaneChange | None = None

    @property
    def committed_change(self) -> LaneChange | None:
        """The change of the lane at the version that it got."""
        change, skipped = self.lane_change, self.versions_skipped
        if change is None or not skipped:
            return change
        return replace(change, version=change.version + skipped)

    @property
    def is_logged(self) -> bool:
        """Whether it has entries of the event log, whose write waits for those of all nodes."""
        return bool(self.completes) or "new_inputs" in self.rows


def columns(units: Sequence[Unit]) -> list[list[Row]]:
    """The arguments of `commit_all` for these units."""
    found: dict[str, list[Row]] = {name: [] for name in PARAMETERS}
    for n, unit in enumerate(units):
        for name, rows in unit.rows.items():
            found[name] += [(n, *row) for row in rows] if name in NUMBERED else rows
    return list(found.values())


def commit_unit(base_version: int, transition: Transition, future: Future[Result]) -> Unit:
    """The unit of a transition."""
    key = transition.lane.key
    completes = transition.completes
    rows: dict[str, list[Row]]
    if transition.removed:
        rows = {"removed_lanes": [(base_version, escape(key.tenant), escape(key.session_id))]}
    else:
        rows = _change(base_version, transition, completes)
    if completes:
        rows["new_events"] = [_log_row(key, complete) for complete in completes]
    return Unit(
        key.tenant,
        rows,
        future,
        lane=key,
        changed=frozenset(change.run.run_id for change in transition.runs),
        completes=completes,
        events=transition.events,
        size=_size(rows),
        lane_change=LaneChange(
            key,
            base_version,
            0 if transition.removed else transition.lane.version,
            transition.events,
        ),
    )


def discard_unit(
    base_version: int, key: SessionKey, completes: Sequence[RunComplete], future: Future[Result]
) -> Unit:
    """The unit of the removal of a session whose lane cannot be loaded."""
    rows: dict[str, list[Row]] = {
        "removed_lanes": [(base_version, escape(key.tenant), escape(key.session_id))],
        "new_events": [_log_row(key, complete) for complete in completes],
    }
    return Unit(
        key.tenant,
        rows,
        future,
        lane=key,
        changed=frozenset(complete.run_id for complete in completes),
        completes=tuple(completes),
        size=_size(rows),
        lane_change=LaneChange(key, 0, 0),
    )


def append_unit(
    key: RunKey, attempt: int, host: str, events: Sequence[RunEvent], future: Future[Result]
) -> Unit:
    """The unit of events of the active run."""
    rows: dict[str, list[Row]] = {
        "fences": [(attempt, escape(key.tenant), escape(key.run_id), escape(host))],
        "new_run_events": [_event_row(key.tenant, event) for event in events],
    }
    return Unit(
        key.tenant, rows, future, appended=key.run_id, events=tuple(events), size=_size(rows)
    )


def session_unit(session: NewSession, future: Future[Result]) -> Unit:
    """The unit of a new session without a run."""
    row = (
        True,
        *(1, 0, 0, 0, None),
        *(0, 0, 0, 0, 0),
        session_weight(session.title, session.metadata),
        session.created_at,
        escape(session.key.tenant),
        escape(session.key.session_id),
        "",
        "",
        session.agent,
        escape(session.title),
        encode_metadata(session.metadata),
    )
    rows: dict[str, list[Row]] = {"new_lanes": [row]}
    return Unit(
        session.key.tenant,
        rows,
        future,
        lane=session.key,
        created=True,
        size=_size(rows),
        lane_change=LaneChange(session.key, 0, 1),
    )


def _change(
    base_version: int, transition: Transition, completes: Iterable[RunComplete]
) -> dict[str, list[Row]]:
    tenant, session_id = transition.lane.key
    rows: dict[str, list[Row]] = {}
    added = 0
    for change in transition.runs:
        if change.request is None:
            rows.setdefault("changed_runs", []).append(_changed_run(tenant, session_id, change))
        else:
            rows.setdefault("new_runs", []).append(
                _new_run(tenant, session_id, change, change.request)
            )
            _add_prompt(rows, "new", RunKey(tenant, change.run.run_id), change.request.prompt)
            added += run_weight(change.request)
        if change.edit is not None:
            _add_update(rows, RunKey(tenant, change.run.run_id), change.run, change.edit.content)
            added += change.edit.growth
        if change.run.retry is not None:
            retried = (_hold(transition), *_retried_run(tenant, session_id, change.run))
            rows.setdefault("retried_runs", []).append(retried)
    if transition.messages:
        messages = [_message_row(tenant, session_id, it) for it in transition.messages]
        rows["new_messages"] = messages
        added += message_weight([row[-1] for row in messages])
        added += kept_weight(transition.messages)
    if transition.inputs:
        _add_inputs(rows, transition.lane.key, transition.inputs)
        added += input_weight(transition.inputs)
    asking = [_asking_row(tenant, it.run) for it in transition.runs if it.run.asking != NO_INPUT]
    if asking:
        rows["asking_runs"] = asking
    lane = _lane_fields(transition, completes, added)
    if base_version == 0:
        rows["new_lanes"] = [(False, *lane, transition.lane.agent, "", None)]
    else:
        rows["changed_lanes"] = [(base_version, *lane)]
    if transition.events:
        rows["new_run_events"] = [_event_row(tenant, event) for event in transition.events]
        rows["new_lane_events"] = [
            (
                entry.place,
                entry.event.index,
                escape(tenant),
                escape(session_id),
                escape(entry.event.run_id),
            )
            for entry in entries_of(transition.lane.version, transition.events)
        ]
    return rows


def _lane_fields(transition: Transition, completes: Iterable[RunComplete], added: int) -> Row:
    lane = transition.lane
    usage = sum((complete.usage for complete in completes), start=NO_USAGE)
    return (
        lane.version,
        lane.accept_seq,
        lane.turn,
        len(lane.waiting),
        min((run.accepted_at for run in lane.waiting), default=None),
        usage.input_tokens,
        usage.output_tokens,
        usage.cache_read_tokens,
        usage.cache_write_tokens,
        usage.requests,
        added,
        # A cancel of the active run has no event and leaves the time unchanged.
        max((event.at for event in transition.events), default=0),
        escape(lane.key.tenant),
        escape(lane.key.session_id),
        "" if lane.active is None else escape(lane.active.run_id),
        lane.waiting[0].agent if lane.waiting else "",
    )


def _new_run(tenant: str, session_id: str, change: RunChange, request: RunRequest) -> Row:
    run = change.run
    return (
        run.accept_seq,
        run.rank,
        run.turn,
        run.timeout,
        run.accepted_at,
        run.started_at,
        None if change.complete is None else change.complete.ended_at,
        run.max_attempts,
        run.attempt,
        len(request.prompt.attachments),
        escape(tenant),
        escape(run.run_id),
        escape(session_id),
        run.state,
        _host(run),
        run.when_busy,
        escape(run.folded_into),
        escape(run.cancel_reason),
        *_end_fields(change.complete),
        encode_metadata(request.metadata),
        request.fingerprint,
        escape(request.prompt.excerpt),
        request.trace or None,
        run.agent,
    )


def _changed_run(tenant: str, session_id: str, change: RunChange) -> Row:
    run = change.run
    return (
        run.rank,
        run.turn,
        run.started_at,
        None if change.complete is None else change.complete.ended_at,
        run.attempt,
        escape(tenant),
        escape(run.run_id),
        escape(session_id),
        run.state,
        _host(run),
        escape(run.folded_into),
        escape(run.cancel_reason),
        *_end_fields(change.complete),
    )


def _retried_run(tenant: str, session_id: str, run: LaneRun) -> Row:
    return (escape(tenant), escape(run.run_id), escape(session_id), encode_retry(run))


def _hold(transition: Transition) -> int:
    """For how many microseconds nobody may claim the lane, as its first run waits for its next
    attempt. A later run neither lifts that hold nor restarts it."""
    head = transition.lane.backing_off
    if head is None or head.retry is None:
        return 0
    left = head.not_before - max((event.at for event in transition.events), default=0)
    return max(0, min(left, head.retry.pause(head.failures)))


def _host(run: LaneRun) -> str:
    """The node on which a run is active, or its agent waits for input."""
    return escape(run.host) if run.state in _HOSTED and not run.folded_into else ""


def _end_fields(complete: RunComplete | None) -> Row:
    """finish_reason, error_reason, error_message, message_id and usage."""
    if complete is None:
        return (None, None, None, None, None)
    error = complete.error
    return (
        complete.finish_reason,
        None if error is None else escape(error.reason),
        None if error is None else escape(error.message),
        escape(complete.message_id),
        encode_usage(complete.usage),
    )


def _add_prompt(rows: dict[str, list[Row]], kind: str, run: RunKey, prompt: Prompt) -> None:
    """Adds the rows of a prompt besides that of its run, a "new" or an "edited" one."""
    key = (escape(run.tenant), escape(run.run_id))
    rest = prompt.text[EXCERPT_CHARS:]
    if rest:
        rows.setdefault(f"{kind}_prompts", []).append((*key, escape(rest)))
    for n, attachment in enumerate(prompt.attachments):
        rows.setdefault(f"{kind}_attachments", []).append(_attachment_row(n, key, attachment))


def _add_update(
    rows: dict[str, list[Row]], key: RunKey, run: LaneRun, content: RunContent | None
) -> None:
    """Adds the rows of an update of a run while it waited."""
    names = (escape(key.tenant), escape(key.run_id), run.when_busy, run.last_update)
    row: Row = (run.revision, 0, False, *names, None, None)
    if content is not None:
        prompt, labels = content
        row = (
            *(run.revision, len(prompt.attachments), True, *names),
            *(encode_metadata(labels), escape(prompt.excerpt)),
        )
        _add_prompt(rows, "edited", key, prompt)
    rows.setdefault("updated_runs", []).append(row)


def _attachment_row(n: int, key: tuple[str, str], attachment: Attachment) -> Row:
    content = attachment.content
    is_text = isinstance(content, str)
    data = content.encode() if isinstance(content, str) else content
    return (n, is_text, *key, escape(attachment.name), escape(attachment.mime_type), data)


def _asking_row(tenant: str, run: LaneRun) -> Row:
    """The lane's state of a run's input requests. It has no meaning after the run's end."""
    return (escape(tenant), escape(run.run_id), encode_asking(run.asking))


def _add_inputs(
    rows: dict[str, list[Row]], key: SessionKey, changes: Iterable[InputChange]
) -> None:
    for change in changes:
        name, request = escape(change.input_request_id), change.request
        answer = encode_answer(change.answer)
        closed_at = None if change.state is InputState.OPEN else change.at
        if request is None:
            row: Row = (closed_at, escape(key.tenant), name, change.state, answer)
            rows.setdefault("closed_inputs", []).append(row)
            continue
        ids = (escape(key.session_id), escape(request.run_id), escape(request.question.key))
        rows.setdefault("new_inputs", []).append(
            (
                *(request.requested_at, request.expires_at, closed_at),
                *(escape(key.tenant), name, *ids, change.state, answer),
                encode_question(request.question),
            )
        )


def _message_row(tenant: str, session_id: str, message: Message) -> Row:
    return (
        message.turn,
        message.ordinal,
        message.created_at,
        escape(tenant),
        escape(session_id),
        escape(message.message_id),
        escape(message.run_id),
        message.role,
        message.finish_reason,
        escape(message.model),
        encode_parts(message.parts),
    )


def _event_row(tenant: str, event: RunEvent) -> Row:
    kind, body = encode_body(event.body)
    return (event.index, event.at, escape(tenant), escape(event.run_id), kind, body)


def _log_row(key: SessionKey, complete: RunComplete) -> Row:
    body = encode_complete(complete)
    return (
        complete.ended_at,
        logged_event_weight(body),
        escape(key.tenant),
        escape(key.session_id),
        escape(complete.run_id),
        body,
    )


def _size(rows: dict[str, list[Row]]) -> int:
    """The approximate size of rows in bytes. Only the last field of a row may be large."""
    return sum(ROW_BYTES + len(row[-1] or "") for some in rows.values() for row in some)
