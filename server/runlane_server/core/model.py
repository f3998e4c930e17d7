"""The records of the domain. All of them are immutable; times are in microseconds since the epoch.

Vocabulary: a *session* is a conversation and owns one *lane*; a *run* is one accepted prompt; a
*turn* is what a run adds to the transcript.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

Micros: TypeAlias = int
"""A point in time: microseconds since the Unix epoch, UTC."""

NO_LABELS: Mapping[str, str] = MappingProxyType({})

EXCERPT_CHARS = 256
"""How much of a prompt goes with a run wherever the run is shown."""

MAX_COMPLETE_TEXT_BYTES = 1 << 20
"""The text of a RunComplete is cut here, so that a message stays under gRPC's 4 MiB default."""


class SessionKey(NamedTuple):
    """Names a session. Everything is keyed by tenant."""

    tenant: str
    session_id: str


class RunKey(NamedTuple):
    """Names a run; a run id is unique within its tenant, as it is the caller's idempotency key."""

    tenant: str
    run_id: str


class RunState(StrEnum):
    """Where a run is. `core.lane.TABLE` says what leads from one to the next."""

    ACCEPTED = "accepted"
    QUEUED = "queued"
    ACTIVE = "active"
    FOLDED = "folded"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def is_terminal(self) -> bool:
        """Whether nothing can happen to the run any more."""
        return self in _TERMINAL


_TERMINAL = frozenset({RunState.COMPLETED, RunState.CANCELLED, RunState.FAILED})


class WhenBusy(StrEnum):
    """What becomes of a prompt whose session has work already."""

    QUEUE = "queue"
    FOLD = "fold"
    REJECT = "reject"
    INTERRUPT = "interrupt"


class CancelScope(StrEnum):
    """Which runs of a session a cancel covers."""

    SESSION = "session"
    ACTIVE = "active"
    WAITING = "waiting"
    RUN = "run"


class FinishReason(StrEnum):
    """Why an assistant message ends where it ends."""

    STOP = "stop"
    LENGTH = "length"
    CONTENT_FILTER = "content_filter"
    TOOL_CALLS = "tool_calls"
    CANCELED = "canceled"
    ERROR = "error"
    TIMEOUT = "timeout"
    INTERRUPTED = "interrupted"


class Role(StrEnum):
    """Who speaks in a message."""

    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class Attachment:
    """Something that goes with a prompt: text, or bytes of some media type."""

    name: str
    mime_type: str
    content: str | bytes

    @property
    def size(self) -> int:
        """Its content in bytes, text as UTF-8."""
        return len(self.content if isinstance(self.content, bytes) else self.content.encode())


@dataclass(frozen=True, slots=True)
class RunError:
    """Why a run failed: a stable word, and a sentence for people."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What a turn cost, in tokens and in requests to a model."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    requests: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cache_read_tokens + other.cache_read_tokens,
            self.cache_write_tokens + other.cache_write_tokens,
            self.requests + other.requests,
        )


NO_USAGE = Usage()


@dataclass(frozen=True)
class Prompt:
    """What a run is asked to do: text, attachments, or both."""

    text: str
    attachments: tuple[Attachment, ...] = ()

    @property
    def excerpt(self) -> str:
        """The beginning of the text, of `EXCERPT_CHARS` characters at the most."""
        return self.text[:EXCERPT_CHARS]

    @cached_property
    def fingerprint(self) -> str:
        """A digest that two prompts share exactly if they are the same (R3)."""
        digest = hashlib.blake2b(digest_size=16)

        def add(content: str | bytes) -> None:
            data = content if isinstance(content, bytes) else content.encode()
            digest.update(f"{type(content).__name__}:{len(data)}:".encode())
            digest.update(data)

        add(self.text)
        for attachment in self.attachments:
            add(attachment.name)
            add(attachment.mime_type)
            add(attachment.content)
        return digest.hexdigest()


class RunRequest(NamedTuple):
    """What a caller asks for with RunAccepted. `timeout` is in microseconds of activity; `trace`
    is the caller's place in a trace (see `core.trace`), empty without one."""

    run_id: str
    prompt: Prompt
    when_busy: WhenBusy = WhenBusy.QUEUE
    timeout: Micros | None = None
    max_attempts: int = 1
    metadata: Mapping[str, str] = NO_LABELS
    trace: str = ""


class RunComplete(NamedTuple):
    """The one terminal event of a run (R23)."""

    session_id: str
    run_id: str
    accept_seq: int
    state: RunState
    finish_reason: FinishReason
    message_id: str
    text: str
    text_truncated: bool
    error: RunError | None
    folded_into: str
    usage: Usage
    attempt: int
    cancel_reason: str
    accepted_at: Micros
    started_at: Micros | None
    ended_at: Micros

    @property
    def cancelled(self) -> bool:
        """Whether a cancel ended the run."""
        return self.state is RunState.CANCELLED


class Run(NamedTuple):
    """A run as it is read back; `complete` is set in a terminal state."""

    session_id: str
    run_id: str
    accept_seq: int
    state: RunState
    when_busy: WhenBusy
    prompt_excerpt: str
    prompt_fingerprint: str
    metadata: Mapping[str, str]
    timeout: Micros | None
    max_attempts: int
    attempt: int
    accepted_at: Micros
    started_at: Micros | None
    ended_at: Micros | None
    folded_into: str
    complete: RunComplete | None


@dataclass(frozen=True, slots=True)
class Session:
    """A session as it is read back."""

    session_id: str
    title: str
    metadata: Mapping[str, str]
    active_run_id: str
    waiting_runs: int
    usage: Usage
    created_at: Micros
    updated_at: Micros

    @property
    def busy(self) -> bool:
        """Whether it has a run that is not terminal."""
        return bool(self.active_run_id) or self.waiting_runs > 0


# --- The transcript -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Text:
    """Text of a message."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool; `tool_call_id` is unique within the turn, the arguments are an object."""

    tool_call_id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool answered."""

    tool_call_id: str
    name: str
    content: str
    is_error: bool = False


Part: TypeAlias = Text | Reasoning | ToolCall | ToolResult | Attachment


class Message(NamedTuple):
    """An entry of the transcript, ordered by (`turn`, `ordinal`).

    A user message is stored without parts and read back with those of its run's prompt.
    """

    message_id: str
    run_id: str
    turn: int
    ordinal: int
    role: Role
    parts: tuple[Part, ...]
    finish_reason: FinishReason | None
    model: str
    created_at: Micros


# --- Events -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Accepted:
    """The run was accepted."""

    accept_seq: int


@dataclass(frozen=True, slots=True)
class Started:
    """The run's agent was started, for the `attempt`-th time."""

    attempt: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """A piece of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class Folded:
    """A run joined a turn; both runs have the event."""

    run_id: str
    into_run_id: str


EventBody: TypeAlias = (
    Accepted | Started | TextDelta | ReasoningDelta | ToolCall | ToolResult | Folded | RunComplete
)


@dataclass(frozen=True, slots=True)
class RunEvent:
    """One thing that happened in a run; numbered from 1 without a gap."""

    run_id: str
    index: int
    at: Micros
    body: EventBody


def cut_utf8(text: str, limit: int) -> tuple[str, bool]:
    """The text cut to `limit` bytes of UTF-8 between two characters, and whether it was."""
    if len(text) * 4 <= limit:
        return text, False
    encoded = text.encode()
    if len(encoded) <= limit:
        return text, False
    return encoded[:limit].decode(errors="ignore"), True


def clean_text(text: str) -> str:
    """The text, with U+FFFD for every half of a surrogate pair that stands alone.

    Such a half is no text and cannot be stored; JSON brings it in (`"\\ud800"`). Two halves that
    follow each other are joined.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
