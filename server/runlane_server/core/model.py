"""The records of the domain. All are immutable; times are in microseconds since the Unix epoch.

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

from runlane_server.core.artifact import ArtifactPiece
from runlane_server.core.retry import RetryPolicy

Micros: TypeAlias = int
"""A point in time: microseconds since the Unix epoch, UTC."""

NO_LABELS: Mapping[str, str] = MappingProxyType({})

EXCERPT_CHARS = 256
"""Length of the excerpt of its prompt that every view of a run contains, in characters."""

MAX_COMPLETE_TEXT_BYTES = 1 << 20
"""Maximum size of the text of a RunComplete: the message stays under gRPC's default of 4 MiB."""


class SessionKey(NamedTuple):
    """The key of a session: a session id is unique within its tenant."""

    tenant: str
    session_id: str


class RunKey(NamedTuple):
    """The key of a run. A run id is the caller's idempotency key and unique within its tenant."""

    tenant: str
    run_id: str


class RunState(StrEnum):
    """The state of a run. `core.lane.TABLE` lists the transitions between states."""

    ACCEPTED = "accepted"
    QUEUED = "queued"
    ACTIVE = "active"
    INPUT_REQUIRED = "input_required"
    FOLDED = "folded"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def is_terminal(self) -> bool:
        """Whether the run has ended; a terminal state never changes."""
        return self in _TERMINAL


_TERMINAL = frozenset({RunState.COMPLETED, RunState.CANCELLED, RunState.FAILED})


class WhenBusy(StrEnum):
    """How to treat a prompt whose session already has work (R26, R27)."""

    QUEUE = "queue"
    FOLD = "fold"
    REJECT = "reject"
    INTERRUPT = "interrupt"


class CancelScope(StrEnum):
    """Which runs of a session a cancel covers (R18)."""

    SESSION = "session"
    ACTIVE = "active"
    WAITING = "waiting"
    RUN = "run"


class FinishReason(StrEnum):
    """Why an assistant message ended."""

    STOP = "stop"
    LENGTH = "length"
    CONTENT_FILTER = "content_filter"
    TOOL_CALLS = "tool_calls"
    CANCELED = "canceled"
    ERROR = "error"
    TIMEOUT = "timeout"
    INTERRUPTED = "interrupted"


class Role(StrEnum):
    """The author of a message."""

    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file that belongs to a prompt: text, or bytes of any media type."""

    name: str
    mime_type: str
    content: str | bytes

    @property
    def size(self) -> int:
        """The size of the content in bytes; text counts as UTF-8."""
        content = self.content
        return len(content) if isinstance(content, bytes) else utf8_size(content)


@dataclass(frozen=True, slots=True)
class RunError:
    """Why a run failed: a stable reason and a message for people."""

    reason: str
    message: str


MAX_COUNT = (1 << 63) - 1
"""The largest count of tokens or requests: a signed 64-bit number, in databases and on the wire."""


@dataclass(frozen=True, slots=True)
class Usage:
    """The cost of a turn in tokens and in requests to a model."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    requests: int = 0

    def __add__(self, other: Usage) -> Usage:
        """The sum; a count stays at `MAX_COUNT`. The statements of the stores do the same."""
        return Usage(
            min(self.input_tokens + other.input_tokens, MAX_COUNT),
            min(self.output_tokens + other.output_tokens, MAX_COUNT),
            min(self.cache_read_tokens + other.cache_read_tokens, MAX_COUNT),
            min(self.cache_write_tokens + other.cache_write_tokens, MAX_COUNT),
            min(self.requests + other.requests, MAX_COUNT),
        )


NO_USAGE = Usage()


@dataclass(frozen=True)
class Prompt:
    """The input of a run: text, attachments, or both."""

    text: str
    attachments: tuple[Attachment, ...] = ()

    @property
    def excerpt(self) -> str:
        """The first `EXCERPT_CHARS` characters of the text."""
        return self.text[:EXCERPT_CHARS]

    @cached_property
    def fingerprint(self) -> str:
        """A digest that is equal for two prompts exactly if they are equal (R3)."""
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
    """A request for a run. `timeout` limits the time the run is active, in microseconds; `trace` is
    the caller's `traceparent` (see `core.trace`), empty for none; `agent` is the requested agent,
    empty for the default; `retry` repeats attempts that the agent failed (R38). The run is accepted
    only while `expected_active` is the active run; empty for any, or none."""

    run_id: str
    prompt: Prompt
    when_busy: WhenBusy = WhenBusy.QUEUE
    timeout: Micros | None = None
    max_attempts: int = 1
    metadata: Mapping[str, str] = NO_LABELS
    trace: str = ""
    agent: str = ""
    retry: RetryPolicy | None = None
    expected_active: str = ""

    @property
    def fingerprint(self) -> str:
        """A digest of what a repeated request is compared by (R3): the prompt, and the agent and
        the retry policy if the request has them."""
        digest = self.prompt.fingerprint
        for part in (self.agent, self.retry):
            if part:
                text = f"{part}:{digest}"
                digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return digest


class RunComplete(NamedTuple):
    """The one terminal event of a run (R23). `result` is JSON, empty if the agent gave none."""

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
    result: str = ""

    @property
    def cancelled(self) -> bool:
        """Whether a cancel ended the run."""
        return self.state is RunState.CANCELLED


class Run(NamedTuple):
    """A stored run. `complete` is set once the run has ended; `agent` is empty for a run from
    before agents had names; `last_event_index` is that of its last event when it was read. See
    `LaneRun` for `revision` and `last_update`."""

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
    agent: str = ""
    retry: RetryPolicy | None = None
    last_event_index: int = 0
    revision: int = 0
    last_update: str = ""

    @property
    def without_text(self) -> Run:
        """The run without the text and the result of its terminal event."""
        if self.complete is None:
            return self
        bare = self.complete._replace(text="", text_truncated=False, result="")
        return self._replace(complete=bare)


@dataclass(frozen=True, slots=True)
class Origin:
    """The session that a fork began as a copy of, up to and with its turn `turn`."""

    session_id: str
    turn: int


@dataclass(frozen=True, slots=True)
class Session:
    """A stored session. `agent` is the agent of its runs that name none, empty for the default;
    `origin` is None unless the session is a fork."""

    session_id: str
    title: str
    metadata: Mapping[str, str]
    active_run_id: str
    waiting_runs: int
    usage: Usage
    created_at: Micros
    updated_at: Micros
    agent: str = ""
    origin: Origin | None = None

    @property
    def busy(self) -> bool:
        """Whether the session has a run that has not ended."""
        return bool(self.active_run_id) or self.waiting_runs > 0

    @property
    def etag(self) -> str:
        """A digest of what callers may change: title, labels and agent."""
        labels = [part for label in sorted(self.metadata.items()) for part in label]
        digest = hashlib.blake2b(digest_size=12)
        for part in (self.title, self.agent, *labels):
            data = part.encode()
            digest.update(f"{len(data)}:".encode())
            digest.update(data)
        return digest.hexdigest()


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
    """A tool call. `tool_call_id` is unique within the turn; the arguments are a JSON object."""

    tool_call_id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The result of a tool call."""

    tool_call_id: str
    name: str
    content: str
    is_error: bool = False


@dataclass(frozen=True, slots=True)
class KeptPart:
    """The place of a part that was stored before its message, as the message is long.

    It is number `number` of an attempt of the message's run, and has `size` bytes. Reading the
    message puts the part back.
    """

    attempt: int
    number: int
    size: int


@dataclass(frozen=True, slots=True)
class ResultPart:
    """The structured result of a completed run, as JSON."""

    json: str


Part: TypeAlias = (
    Text | Reasoning | ToolCall | ToolResult | Attachment | ArtifactPiece | ResultPart | KeptPart
)


class Message(NamedTuple):
    """A message of the transcript, which is ordered by (`turn`, `ordinal`).

    A user message is stored without parts; reading it adds the parts from its run's prompt.
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
    """The run's agent was started; attempts count from 1."""

    attempt: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A fragment of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """A fragment of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class CustomEvent:
    """An event of a type that only the agent and its callers know. It is in no transcript."""

    type: str
    json: str


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a step of the agent, as JSON; no later attempt repeats the step (R39)."""

    key: str
    json: str


@dataclass(frozen=True, slots=True)
class Folded:
    """A run joined the turn of another one; both runs log this event (R26)."""

    run_id: str
    into_run_id: str


@dataclass(frozen=True, slots=True)
class InputRequested:
    """The agent asks people a question (R40). `choices_json` is an array of strings; `expires_at`
    is 0 if the request does not expire."""

    input_request_id: str
    key: str
    kind: str
    text: str
    tool_name: str
    arguments_json: str
    choices_json: str
    schema_json: str
    expires_at: Micros
    digest: str


@dataclass(frozen=True, slots=True)
class InputAnswered:
    """An input request was answered (R41). If no other is open, the run waits for a slot."""

    input_request_id: str


@dataclass(frozen=True, slots=True)
class InputWithdrawn:
    """An input request needs no answer any more: its run was cancelled or has ended (R42)."""

    input_request_id: str


@dataclass(frozen=True, slots=True)
class InputExpired:
    """An input request expired: its default answer applies, or the run fails (R43)."""

    input_request_id: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """The attempt continues after input; its output so far stays."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Updated:
    """The waiting run was edited (R46). `when_busy` is the value of a WhenBusy."""

    revision: int
    prompt_excerpt: str
    when_busy: str


@dataclass(frozen=True, slots=True)
class Corrupt:
    """The event cannot be read from the store; only its index and its time are known."""


EventBody: TypeAlias = (
    Accepted
    | Started
    | TextDelta
    | ReasoningDelta
    | ToolCall
    | ToolResult
    | ArtifactPiece
    | CustomEvent
    | StepResult
    | Folded
    | InputRequested
    | InputAnswered
    | InputWithdrawn
    | InputExpired
    | Resumed
    | Updated
    | RunComplete
    | Corrupt
)


@dataclass(frozen=True, slots=True)
class RunEvent:
    """An event of a run. Indexes count from 1 without gaps."""

    run_id: str
    index: int
    at: Micros
    body: EventBody


def utf8_size(text: str) -> int:
    """The size of a text in bytes of UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def cut_utf8(text: str, limit: int) -> tuple[str, bool]:
    """Cuts a text to at most `limit` bytes of UTF-8, between two characters.

    Returns the text and whether it was cut.
    """
    if len(text) * 4 <= limit:
        return text, False
    # A character has at least one byte, so the rest of a long text need not be encoded.
    encoded = text[: limit + 1].encode()
    if len(encoded) <= limit:
        return text, False
    return encoded[:limit].decode(errors="ignore"), True


def clean_text(text: str) -> str:
    """Replaces each lone half of a surrogate pair with U+FFFD, and joins two adjacent halves.

    A lone half comes from JSON (`"\\ud800"`) and cannot be stored: UTF-8 cannot encode it.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
