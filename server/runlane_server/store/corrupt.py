"""Stored records that cannot be read, and the placeholders that callers get instead.

Every store decodes each row through `decoded`, so that one bad row never ends a list, a
subscription or a read of other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import structlog

from runlane_server.core.errors import CorruptRecord
from runlane_server.core.model import (
    NO_LABELS,
    NO_USAGE,
    Corrupt,
    FinishReason,
    Message,
    Micros,
    Role,
    Run,
    RunComplete,
    RunError,
    RunEvent,
    RunState,
    Session,
    Text,
    WhenBusy,
)
from runlane_server.store.soundness import verified

log = structlog.get_logger()

Record = TypeVar("Record")

UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    CorruptRecord,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""The exceptions of decoding a bad row. Errors of the database itself are not among them."""

EXPLANATION = (
    "the stored record is damaged; 'runlane-server check' names it,"
    " and deleting its session removes it"
)

LABEL = "runlane.error"
"""The label of a session whose record is damaged."""

_LOGGED: set[str] = set()
"""The records that were logged: each is logged once and not with each read."""

_MAX_LOGGED = 10_000

MARK = "x"
"""Precedes the bytes of a name that is not UTF-8 in hexadecimal form."""

_COLLECTED: ContextVar[list[str] | None] = ContextVar("_COLLECTED", default=None)


def decoded(
    decode: Callable[[], Record], placeholder: Callable[[], Record], kind: str, *key: object
) -> Record:
    """The record of a row, or its placeholder. `kind` and `key` name the row in the log."""
    try:
        return verified(decode())
    except UNREADABLE as error:
        _report(kind, key, error)
        return placeholder()


def required(decode: Callable[[], Record], kind: str, *key: object) -> Record:
    """The record of a row that has no placeholder. Raises CorruptRecord."""
    try:
        return verified(decode())
    except UNREADABLE as error:
        _report(kind, key, error)
        name = "/".join(map(shown_name, key))
        raise CorruptRecord(f"{kind} {name!r}: {EXPLANATION}") from error


def is_readable(decode: Callable[[], object], kind: str, *key: object) -> bool:
    """Whether a row can be read; for rows that callers do without."""
    try:
        verified(decode())
    except UNREADABLE as error:
        _report(kind, key, error)
        return False
    return True


@contextmanager
def collecting() -> Iterator[list[str]]:
    """Collects a line for each damaged record that is read in this context, instead of a log."""
    lines: list[str] = []
    token = _COLLECTED.set(lines)
    try:
        yield lines
    finally:
        _COLLECTED.reset(token)


def _report(kind: str, key: tuple[object, ...], error: Exception) -> None:
    name = f"{kind} {'/'.join(map(shown_name, key))}"
    collected = _COLLECTED.get()
    if collected is not None:
        collected.append(f"{name} cannot be read: {describe(error)}")
    elif name not in _LOGGED and len(_LOGGED) < _MAX_LOGGED:
        _LOGGED.add(name)
        log.error("stored record damaged", record=name, error=describe(error))


def describe(error: Exception) -> str:
    """Describes the fault of a row in one line."""
    return f"{type(error).__name__}: {error}"[:200].encode(errors="replace").decode()


def shown_name(value: object) -> str:
    """A part of a key as text that can be printed: in hexadecimal form if it is not UTF-8."""
    data = _stored(value) if isinstance(value, str) else value
    if not isinstance(data, bytes):
        return text_or_empty(value)
    try:
        return text_or_empty(data.decode())
    except UnicodeDecodeError:
        return MARK + data[:1_024].hex()


def _stored(text: str) -> bytes:
    """The bytes of a text, of which those that are not UTF-8 were read as lone surrogates."""
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode(errors="surrogatepass")


def text_or_empty(value: object) -> str:
    """A value of a bad row as text that can be sent."""
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        return ""
    return value[:1_024].encode(errors="replace").decode()


def _time(value: object) -> Micros:
    return value if type(value) is int and 0 <= value < 1 << 57 else 0


def _count(value: object) -> int:
    return value if type(value) is int and 0 <= value < 1 << 63 else 0


def corrupt_complete(
    session_id: object, run_id: object, *, accept_seq: object = 0, ended_at: object = 0
) -> RunComplete:
    """The placeholder of a terminal event."""
    return RunComplete(
        session_id=text_or_empty(session_id),
        run_id=text_or_empty(run_id),
        accept_seq=_count(accept_seq),
        state=RunState.FAILED,
        finish_reason=FinishReason.ERROR,
        message_id="",
        text="",
        text_truncated=False,
        error=RunError(CorruptRecord.reason, EXPLANATION),
        folded_into="",
        usage=NO_USAGE,
        attempt=0,
        cancel_reason="",
        accepted_at=_time(ended_at),
        started_at=None,
        ended_at=_time(ended_at),
    )


def corrupt_run(session_id: object, run_id: object, accept_seq: object, ended_at: object) -> Run:
    """The placeholder of a run."""
    complete = corrupt_complete(session_id, run_id, accept_seq=accept_seq, ended_at=ended_at)
    return Run(
        session_id=complete.session_id,
        run_id=complete.run_id,
        accept_seq=complete.accept_seq,
        state=complete.state,
        when_busy=WhenBusy.QUEUE,
        prompt_excerpt="",
        prompt_fingerprint="",
        metadata=NO_LABELS,
        timeout=None,
        max_attempts=0,
        attempt=0,
        accepted_at=complete.accepted_at,
        started_at=None,
        ended_at=complete.ended_at,
        folded_into="",
        complete=complete,
    )


def is_corrupt(run: Run) -> bool:
    """Whether a run is a placeholder."""
    error = None if run.complete is None else run.complete.error
    return error is not None and error.reason == CorruptRecord.reason


def corrupt_event(run_id: str, index: int, at: object) -> RunEvent:
    """The placeholder of an event of a run."""
    return RunEvent(run_id, index, _time(at), Corrupt())


def corrupt_session(session_id: object, created_at: object) -> Session:
    """The placeholder of a session."""
    at = _time(created_at)
    labels = {LABEL: CorruptRecord.reason}
    return Session(text_or_empty(session_id), "", labels, "", 0, NO_USAGE, at, at)


CORRUPT_PARTS = (Text(f"[{CorruptRecord.reason}] {EXPLANATION}"),)
"""The content of a message that cannot be read."""


def corrupt_message(row: Any) -> Message:
    """The placeholder of a message: a prompt if it was one, otherwise an answer that failed."""
    role = Role.USER if row["role"] == Role.USER else Role.ASSISTANT
    return Message(
        message_id=text_or_empty(row["message_id"]),
        run_id=text_or_empty(row["run_id"]),
        turn=row["turn"],
        ordinal=row["ordinal"],
        role=role,
        parts=CORRUPT_PARTS,
        finish_reason=None if role is Role.USER else FinishReason.ERROR,
        model="",
        created_at=_time(row["created_at"]),
    )
