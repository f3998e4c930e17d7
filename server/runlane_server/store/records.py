"""Domain records from the rows of a database.

Every row goes through `corrupt.decoded` here, which replaces an unreadable one by its placeholder.
SQLite and PostgreSQL use the same column names. They differ in how they keep text: `text` turns a
kept text into the original one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

from runlane_server.core.errors import CursorCompacted
from runlane_server.core.model import (
    MAX_COMPLETE_TEXT_BYTES,
    FinishReason,
    KeptPart,
    Message,
    Origin,
    Part,
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
    Text,
    Usage,
    WhenBusy,
    cut_utf8,
)
from runlane_server.core.transition import Lane, LaneRun
from runlane_server.core.turn import result_of, text_of
from runlane_server.store.base import DeletedRun, LoggedComplete
from runlane_server.store.codec import (
    RUN_COMPLETE,
    decode_body,
    decode_complete,
    decode_metadata,
    decode_part,
    decode_parts,
    decode_retry,
    decode_usage,
)
from runlane_server.store.corrupt import (
    CORRUPT_PARTS,
    corrupt_complete,
    corrupt_event,
    corrupt_message,
    corrupt_run,
    corrupt_session,
    decoded,
    is_readable,
    required,
)
from runlane_server.store.lane_log import LaneEntry

Row: TypeAlias = Any
"""A row with its values by column name: a `sqlite3.Row` or an `asyncpg.Record`."""

DecodeText: TypeAlias = Callable[[str], str]

ReadKept: TypeAlias = Callable[[KeptPart], str | None]
"""Reads an encoded part that was stored before its message; None if it is not there."""

OPEN_STATES = frozenset(state for state in RunState if not state.is_terminal)

END_OF_LIST = (1 << 63) - 1
"""The place before which a list begins that is read from its end."""


class Answer(NamedTuple):
    """The parts of a RunComplete that come from the last message of its turn."""

    text: str
    is_truncated: bool
    result: str


NO_ANSWER = Answer("", is_truncated=False, result="")
"""The answer of a run that is open or has no message."""


def assemble_lane(
    key: SessionKey,
    *,
    version: int,
    accept_seq: int,
    turn: int,
    agent: str,
    runs: Iterable[LaneRun],
) -> Lane:
    """A lane from its open runs, which are in accept order."""
    folded: list[LaneRun] = []
    waiting: list[LaneRun] = []
    active: LaneRun | None = None
    for run in runs:
        if run.folded_into:
            folded.append(run)
        elif run.state in {RunState.ACCEPTED, RunState.QUEUED}:
            waiting.append(run)
        else:
            active = run
    waiting.sort(key=lambda run: run.rank)
    return Lane(
        key,
        version=version,
        accept_seq=accept_seq,
        turn=turn,
        active=active,
        folded=tuple(folded),
        waiting=tuple(waiting),
        agent=agent,
    )


def with_retry(run: LaneRun, retry: str | None) -> LaneRun:
    """The run of a lane with its retry policy, and where it stands."""
    state = decode_retry(retry)
    return run if state is None else run._replace(**state._asdict())


def lane_from(key: SessionKey, build: Callable[[], Lane]) -> Lane:
    """The lane that `build` makes of its rows. Raises CorruptRecord."""
    return required(build, "session", *key)


def run_from(
    tenant: str,
    row: Row,
    text: DecodeText,
    answer: Callable[[], Answer] = lambda: NO_ANSWER,
) -> Run:
    """A run; `answer` provides what its RunComplete has from its last message."""
    return decoded(
        lambda: _run(row, text, answer),
        lambda: corrupt_run(row["session_id"], row["run_id"], row["accept_seq"], row["ended_at"]),
        "run",
        tenant,
        row["run_id"],
    )


def _run(row: Row, text: DecodeText, answer: Callable[[], Answer]) -> Run:
    state = RunState(row["state"])
    retry = decode_retry(row["retry"])
    complete = None
    if state.is_terminal:
        complete = _complete_of_run(row, state, text, answer())
    return Run(
        session_id=text(row["session_id"]),
        run_id=text(row["run_id"]),
        accept_seq=row["accept_seq"],
        state=state,
        when_busy=WhenBusy(row["when_busy"]),
        prompt_excerpt=text(row["prompt_head"]),
        prompt_fingerprint=row["prompt_fingerprint"],
        metadata=decode_metadata(row["metadata"]),
        timeout=row["timeout"],
        max_attempts=row["max_attempts"],
        attempt=row["attempt"],
        accepted_at=row["accepted_at"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        folded_into=text(row["folded_into"]),
        complete=complete,
        agent=row["agent"],
        retry=None if retry is None else retry.retry,
        last_event_index=row["last_event_index"],
        revision=row["revision"],
        last_update=row["last_update"] or "",
    )


def _complete_of_run(row: Row, state: RunState, text: DecodeText, answer: Answer) -> RunComplete:
    reason = row["error_reason"]
    return RunComplete(
        session_id=text(row["session_id"]),
        run_id=text(row["run_id"]),
        accept_seq=row["accept_seq"],
        state=state,
        finish_reason=FinishReason(row["finish_reason"]),
        message_id=text(row["message_id"]),
        text=answer.text,
        text_truncated=answer.is_truncated,
        error=None if reason is None else RunError(text(reason), text(row["error_message"])),
        folded_into=text(row["folded_into"]),
        usage=decode_usage(row["usage"]),
        attempt=row["attempt"],
        cancel_reason=text(row["cancel_reason"]),
        accepted_at=row["accepted_at"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        result=answer.result,
    )


def session_from(tenant: str, row: Row, text: DecodeText) -> Session:
    """A session."""
    return decoded(
        lambda: _session(row, text),
        lambda: corrupt_session(row["session_id"], row["created_at"]),
        "session",
        tenant,
        row["session_id"],
    )


def _session(row: Row, text: DecodeText) -> Session:
    return Session(
        session_id=text(row["session_id"]),
        title=text(row["title"]),
        metadata=decode_metadata(row["metadata"]),
        active_run_id=text(row["active_run_id"]),
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
        agent=row["agent"],
        origin=_origin(row, text),
    )


def _origin(row: Row, text: DecodeText) -> Origin | None:
    name = row["origin_id"]
    return None if name is None else Origin(text(name), row["origin_turn"])


def message_from(
    tenant: str,
    row: Row,
    text: DecodeText,
    read_prompt: Callable[[], Prompt],
    read_kept: ReadKept,
) -> Message:
    """A message; the parts of a user message stand in the prompt of its run."""
    return decoded(
        lambda: _message(row, text, read_prompt, read_kept),
        lambda: corrupt_message(row),
        "message",
        tenant,
        row["message_id"],
    )


def _message(
    row: Row, text: DecodeText, read_prompt: Callable[[], Prompt], read_kept: ReadKept
) -> Message:
    role = Role(row["role"])
    reason = row["finish_reason"]
    return Message(
        message_id=text(row["message_id"]),
        run_id=text(row["run_id"]),
        turn=row["turn"],
        ordinal=row["ordinal"],
        role=role,
        parts=(
            prompt_parts(read_prompt())
            if role is Role.USER
            else put_back(decode_parts(row["parts"]), read_kept)
        ),
        finish_reason=None if reason is None else FinishReason(reason),
        model=text(row["model"]),
        created_at=row["created_at"],
    )


def put_back(parts: tuple[Part, ...], read_kept: ReadKept) -> tuple[Part, ...]:
    """The parts of a message, with those that were stored before it."""
    if not any(isinstance(part, KeptPart) for part in parts):
        return parts
    return tuple(_kept(part, read_kept) if isinstance(part, KeptPart) else part for part in parts)


def _kept(place: KeptPart, read_kept: ReadKept) -> Part:
    text = read_kept(place)
    if text is None:
        raise ValueError(f"part {place.number} of attempt {place.attempt} is not there")
    part = decode_part(text)
    if isinstance(part, KeptPart):
        raise ValueError(f"part {place.number} of attempt {place.attempt} refers to another")  # noqa: TRY004
    return part


def prompt_from(key: RunKey, read: Callable[[], Prompt]) -> Prompt:
    """The prompt that `read` makes of its rows. Raises CorruptRecord."""
    return required(read, "prompt of run", *key)


def deleted_run_from(key: RunKey, row: Row, text: DecodeText) -> DeletedRun:
    """A run whose session was deleted."""
    return decoded(
        lambda: DeletedRun(text(row["session_id"]), row["prompt_fingerprint"], row["events"]),
        lambda: DeletedRun("", "", 0),
        "deleted run",
        *key,
    )


def event_from(key: RunKey, row: Row, read_complete: Callable[[], RunComplete]) -> RunEvent:
    """An event of a run; `read_complete` provides the body of the last one."""

    def decode() -> RunEvent:
        ended = row["kind"] == RUN_COMPLETE
        body = read_complete() if ended else decode_body(row["kind"], row["body"])
        return RunEvent(key.run_id, row["idx"], row["at"], body)

    return decoded(
        decode,
        lambda: corrupt_event(key.run_id, row["idx"], row["at"]),
        "event",
        *key,
        row["idx"],
    )


def entry_from(row: Row, read_event: Callable[[], RunEvent]) -> LaneEntry:
    """An event at its place in the log of a lane. Raises CursorCompacted if it was removed."""
    if row["kind"] is None:
        raise CursorCompacted(
            "events of the session after that place were removed; subscribe without a cursor"
        )
    return LaneEntry(row["place"], read_event())


def logged_from(row: Row, text: DecodeText) -> LoggedComplete:
    """A terminal event from its row in the log, whose ids count: a filter selects by them."""
    position = row["position"]
    complete = decoded(
        lambda: _complete(row, text),
        lambda: corrupt_complete(row["session_id"], row["run_id"], ended_at=row["ended_at"]),
        "terminal event of run",
        row["tenant"],
        row["run_id"],
    )
    # No caller has the tenant of an unreadable name.
    tenant = text(row["tenant"]) if isinstance(row["tenant"], str) else ""
    return LoggedComplete(position, tenant, complete)


def _complete(row: Row, text: DecodeText) -> RunComplete:
    complete = decode_complete(row["body"])
    ids = text(row["session_id"]), text(row["run_id"])
    if (complete.session_id, complete.run_id) != ids:
        raise ValueError("the event names another run than its row")
    return complete


def readable_keys(rows: Iterable[Row], text: DecodeText) -> Iterator[tuple[Row, SessionKey]]:
    """The rows that name a session, with its key; without those whose key cannot be read."""
    for row in rows:
        key = SessionKey(row["tenant"], row["session_id"])
        if is_readable(lambda key=key: key, "session", *key):  # type: ignore[misc]
            yield row, SessionKey(text(key.tenant), text(key.session_id))


def prompt_parts(prompt: Prompt) -> tuple[Part, ...]:
    """The parts of a user message: the text, unless it is blank, then the attachments."""
    text: tuple[Part, ...] = (Text(prompt.text),) if prompt.text.strip() else ()
    return (*text, *prompt.attachments)


class MessageParts(NamedTuple):
    """The parts of a message."""

    parts: tuple[Part, ...]


def answer_from(tenant: str, message_id: str, parts: str | None) -> Answer:
    """The parts of a RunComplete that come from the parts of its last message."""
    readable = decoded(
        lambda: MessageParts(decode_parts(parts)),
        lambda: MessageParts(CORRUPT_PARTS),
        "message",
        tenant,
        message_id,
    )
    text, is_truncated = cut_utf8(text_of(readable.parts), MAX_COMPLETE_TEXT_BYTES)
    return Answer(text, is_truncated, result_of(readable.parts))
