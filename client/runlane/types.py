"""The records that calls take and return. All of them are frozen; times are aware, in UTC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import TypeAlias

NO_LABELS: Mapping[str, str] = MappingProxyType({})


class RunState(StrEnum):
    """Where a run is between its acceptance and its end."""

    ACCEPTED = "accepted"
    """First in its lane, and waits for a slot on a node or for the agent to be ready."""
    QUEUED = "queued"
    """Waits behind another run of its session."""
    ACTIVE = "active"
    """Its agent is running."""
    FOLDED = "folded"
    """Joined the turn of the active run, and ends with it."""
    CANCELLING = "cancelling"
    """Covered by a cancel while it was active; its agent has not returned yet."""
    COMPLETED = "completed"
    """Ended well."""
    CANCELLED = "cancelled"
    """Ended by a cancel."""
    FAILED = "failed"
    """Ended by an error, a timeout, or the loss of its node."""
    UNKNOWN = "unknown"
    """A state that a newer server knows and this client does not."""

    @property
    def terminal(self) -> bool:
        """Whether nothing can happen to the run any more."""
        return self in _TERMINAL


_TERMINAL = frozenset({RunState.COMPLETED, RunState.CANCELLED, RunState.FAILED})

NOT_TERMINAL: tuple[RunState, ...] = (
    RunState.ACCEPTED,
    RunState.QUEUED,
    RunState.ACTIVE,
    RunState.FOLDED,
    RunState.CANCELLING,
)
"""The states of a run that has not ended."""


class WhenBusy(StrEnum):
    """What becomes of a prompt whose session has work already."""

    QUEUE = "queue"
    """It waits for its turn."""
    FOLD = "fold"
    """It joins the active turn at its next step; after the last step it has a turn of its own."""
    REJECT = "reject"
    """It is refused with `SessionBusy`."""
    INTERRUPT = "interrupt"
    """The active run is cancelled, and this one goes to the head of the queue, which is kept."""


class CancelScope(StrEnum):
    """Which runs of a session a cancel covers."""

    SESSION = "session"
    """All of them."""
    ACTIVE = "active"
    """The active one, with those folded into it; the waiting ones live on."""
    WAITING = "waiting"
    """The waiting ones; the active one lives on."""


class FinishReason(StrEnum):
    """Why the agent's text ends where it ends."""

    STOP = "stop"
    """The agent came to its end."""
    LENGTH = "length"
    """The model's limit of output was reached."""
    CONTENT_FILTER = "content_filter"
    """The provider withheld the rest."""
    TOOL_CALLS = "tool_calls"
    """The agent called tools; its turn went on after them."""
    CANCELED = "canceled"
    """A cancel covered the run."""
    ERROR = "error"
    """The agent failed."""
    TIMEOUT = "timeout"
    """The run's timeout passed."""
    INTERRUPTED = "interrupted"
    """The node that ran it was lost, and no attempt was left."""
    UNKNOWN = "unknown"
    """A reason that a newer server knows and this client does not."""


class Role(StrEnum):
    """Who speaks in a message."""

    USER = "user"
    """A prompt."""
    ASSISTANT = "assistant"
    """The agent."""
    TOOL = "tool"
    """The tools that the agent called."""
    UNKNOWN = "unknown"
    """One that a newer server knows and this client does not."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """Something that goes with a prompt: text, or bytes of some media type.

    `name` and `mime_type` are at most 255 bytes each. An empty `mime_type` means `text/plain` for
    text and `application/octet-stream` for bytes.
    """

    name: str
    content: str | bytes
    mime_type: str = ""


@dataclass(frozen=True, slots=True)
class RunError:
    """Why a run failed.

    `reason` is a stable word: AGENT_ERROR, AGENT_NOT_READY, RUN_TIMEOUT, INTERRUPTED, or one that
    the agent chose. `message` is a sentence for people.
    """

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What a run, or all runs of a session, cost: tokens, and requests to the model."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    requests: int = 0


@dataclass(frozen=True, slots=True)
class RunComplete:
    """The one terminal event of a run.

    `usage` is None for a folded run, as its turn's run has it, and `message_id` for one that was
    cancelled by itself. `attempt` is how often the run was started, 0 if it never was.
    """

    session_id: str
    run_id: str
    accept_seq: int
    state: RunState
    cancelled: bool
    finish_reason: FinishReason | None
    error: RunError | None
    message_id: str | None
    text: str
    text_truncated: bool
    folded_into: str | None
    usage: Usage | None
    attempt: int
    cancel_reason: str
    accepted_at: datetime
    started_at: datetime | None
    ended_at: datetime


@dataclass(frozen=True, slots=True)
class Run:
    """One accepted prompt. `run_complete` is set in a terminal state; ListRuns omits its text."""

    session_id: str
    run_id: str
    accept_seq: int
    state: RunState
    when_busy: WhenBusy
    prompt_excerpt: str
    accepted_at: datetime
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)
    timeout: timedelta | None = None
    max_attempts: int = 1
    attempt: int = 0
    started_at: datetime | None = None
    ended_at: datetime | None = None
    folded_into: str | None = None
    run_complete: RunComplete | None = None


@dataclass(frozen=True, slots=True)
class CancelledRun:
    """A run that a cancel covered, with the state it was in when the cancel took effect."""

    session_id: str
    run_id: str
    accept_seq: int
    state_when_cancelled: RunState


@dataclass(frozen=True, slots=True)
class CancelReceipt:
    """What a cancel covered in one session.

    `cancelled` is in accept order, and empty if there was nothing to cancel. No run of the session
    with an accept_seq above `fence_accept_seq` was touched. `session_id` is empty where the cancel
    named a run only and covered none.
    """

    session_id: str
    cancelled: tuple[CancelledRun, ...]
    fence_accept_seq: int


# --- Sessions and transcripts --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Session:
    """One conversation: an ordered transcript, and one lane of runs."""

    session_id: str
    title: str
    metadata: Mapping[str, str] = field(hash=False)
    busy: bool
    active_run_id: str | None
    waiting_runs: int
    usage: Usage
    created_at: datetime
    updated_at: datetime


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
    """What a tool answered, or that the end of the turn cut it off."""

    tool_call_id: str
    name: str
    content: str
    is_error: bool = False


Part: TypeAlias = Text | Reasoning | ToolCall | ToolResult | Attachment
"""A part of a message."""


@dataclass(frozen=True, slots=True)
class Message:
    """An entry of a transcript. `turn` counts the turns of the session from 1.

    With `continues`, its parts go on on the next page in a message of the same id; the iterator of
    `Client.list_messages` joins those.
    """

    message_id: str
    run_id: str
    turn: int
    role: Role
    parts: tuple[Part, ...]
    finish_reason: FinishReason | None
    model: str
    created_at: datetime
    continues: bool = False

    @property
    def text(self) -> str:
        """Its texts, joined; neither reasoning nor tools nor attachments."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


# --- Events --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Accepted:
    """The run was accepted."""

    accept_seq: int


@dataclass(frozen=True, slots=True)
class Started:
    """The run's agent was started.

    With an `attempt` above 1 the run starts over: deltas that came before do not count.
    """

    attempt: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the answer, appended to those before it."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """A piece of the model's reasoning, appended to those before it."""

    text: str


@dataclass(frozen=True, slots=True)
class Folded:
    """A run joined a turn. Both runs have the event."""

    run_id: str
    into_run_id: str


EventBody: TypeAlias = (
    Accepted | Started | TextDelta | ReasoningDelta | ToolCall | ToolResult | Folded | RunComplete
)
"""What can happen in a run."""


@dataclass(frozen=True, slots=True)
class RunEvent:
    """One thing that happened in a run; numbered from 1, the last one is its `RunComplete`."""

    index: int
    time: datetime
    body: EventBody


@dataclass(frozen=True, slots=True)
class Progress:
    """A mark in an idle subscription: nothing that matches happened up to `cursor`."""

    cursor: str
    time: datetime
