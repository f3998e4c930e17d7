"""Domain records from the rows of a database, and the parts that they are assembled from.

SQLite and PostgreSQL use the same column names. They differ in how they keep text: `text` turns a
kept text into the original one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from runlane_server.core.model import (
    MAX_COMPLETE_TEXT_BYTES,
    FinishReason,
    Message,
    Part,
    Prompt,
    Role,
    Run,
    RunComplete,
    RunError,
    RunState,
    Session,
    SessionKey,
    Text,
    Usage,
    WhenBusy,
    cut_utf8,
)
from runlane_server.core.transition import Lane, LaneRun
from runlane_server.core.turn import text_of
from runlane_server.store.codec import decode_metadata, decode_usage

Row: TypeAlias = Any
"""A row with its values by column name: a `sqlite3.Row` or an `asyncpg.Record`."""

DecodeText: TypeAlias = Callable[[str], str]

OPEN_STATES = frozenset(state for state in RunState if not state.is_terminal)

END_OF_LIST = (1 << 63) - 1
"""The place before which a list begins that is read from its end."""


def assemble_lane(
    key: SessionKey, *, version: int, accept_seq: int, turn: int, runs: Iterable[LaneRun]
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
    )


def run_from(
    row: Row, text: DecodeText, complete_text: str = "", text_truncated: bool = False
) -> Run:
    """A run; `complete_text` becomes the text of its RunComplete."""
    state = RunState(row["state"])
    complete = None
    if state.is_terminal:
        complete = _complete_from(row, state, text, complete_text, text_truncated)
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
    )


def _complete_from(
    row: Row, state: RunState, text: DecodeText, complete_text: str, text_truncated: bool
) -> RunComplete:
    reason = row["error_reason"]
    return RunComplete(
        session_id=text(row["session_id"]),
        run_id=text(row["run_id"]),
        accept_seq=row["accept_seq"],
        state=state,
        finish_reason=FinishReason(row["finish_reason"]),
        message_id=text(row["message_id"]),
        text=complete_text,
        text_truncated=text_truncated,
        error=None if reason is None else RunError(text(reason), text(row["error_message"])),
        folded_into=text(row["folded_into"]),
        usage=decode_usage(row["usage"]),
        attempt=row["attempt"],
        cancel_reason=text(row["cancel_reason"]),
        accepted_at=row["accepted_at"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
    )


def session_from(row: Row, text: DecodeText) -> Session:
    """A session."""
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
    )


def message_from(row: Row, text: DecodeText, role: Role, parts: tuple[Part, ...]) -> Message:
    """A message with these parts; those of a user message stand in the prompt of its run."""
    reason = row["finish_reason"]
    return Message(
        message_id=text(row["message_id"]),
        run_id=text(row["run_id"]),
        turn=row["turn"],
        ordinal=row["ordinal"],
        role=role,
        parts=parts,
        finish_reason=None if reason is None else FinishReason(reason),
        model=text(row["model"]),
        created_at=row["created_at"],
    )


def prompt_parts(prompt: Prompt) -> tuple[Part, ...]:
    """The parts of a user message: the text, unless it is blank, then the attachments."""
    text: tuple[Part, ...] = (Text(prompt.text),) if prompt.text.strip() else ()
    return (*text, *prompt.attachments)


def complete_text(parts: Sequence[Part]) -> tuple[str, bool]:
    """The text of a RunComplete, from the parts of its message, and whether it was truncated."""
    return cut_utf8(text_of(parts), MAX_COMPLETE_TEXT_BYTES)
