"""The records that calls accept and return. Records are frozen; times are aware and in UTC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import TypeAlias

from runlane.inputs import (
    InputAnswered,
    InputExpired,
    InputRequested,
    InputWithdrawn,
    Resumed,
)

NO_LABELS: Mapping[str, str] = MappingProxyType({})


class RunState(StrEnum):
    """The state of a run."""

    ACCEPTED = "accepted"
    """First in its lane; waits for a slot, for the agent, or for its next attempt."""
    QUEUED = "queued"
    """Waits behind another run of its session."""
    ACTIVE = "active"
    """Its agent is running."""
    INPUT_REQUIRED = "input_required"
    """Its agent has asked people; waits for the answers or, when it has them all, for a slot."""
    FOLDED = "folded"
    """Joined the turn of the active run; ends together with it."""
    CANCELLING = "cancelling"
    """A cancel covered the active run; its agent has not returned yet."""
    COMPLETED = "completed"
    """Ended successfully."""
    CANCELLED = "cancelled"
    """Ended by a cancel."""
    FAILED = "failed"
    """Ended by an error, a timeout or the loss of its node."""
    UNKNOWN = "unknown"
    """A state of a newer server, unknown to this client."""

    @property
    def terminal(self) -> bool:
        """True if the run has ended."""
        return self in _TERMINAL


_TERMINAL = frozenset({RunState.COMPLETED, RunState.CANCELLED, RunState.FAILED})

NOT_TERMINAL: tuple[RunState, ...] = (
    RunState.ACCEPTED,
    RunState.QUEUED,
    RunState.ACTIVE,
    RunState.INPUT_REQUIRED,
    RunState.FOLDED,
    RunState.CANCELLING,
)
"""The states of runs that have not ended."""


class WhenBusy(StrEnum):
    """How the server handles a prompt when its session already has work."""

    QUEUE = "queue"
    """The run waits in the queue."""
    FOLD = "fold"
    """The run joins the active turn at its next step; after the last step it gets its own turn."""
    REJECT = "reject"
    """The run is rejected with `SessionBusy`."""
    INTERRUPT = "interrupt"
    """The active run is cancelled and this run goes to the head of the queue; the queue is kept."""


class CancelScope(StrEnum):
    """The runs of a session that a cancel covers."""

    SESSION = "session"
    """All runs."""
    ACTIVE = "active"
    """The active run and the runs folded into it; waiting runs are kept."""
    WAITING = "waiting"
    """The waiting runs; the active run continues."""


class FinishReason(StrEnum):
    """Why the agent stopped."""

    STOP = "stop"
    """The agent finished."""
    LENGTH = "length"
    """The model reached its output limit."""
    CONTENT_FILTER = "content_filter"
    """The provider withheld the rest of the output."""
    TOOL_CALLS = "tool_calls"
    """The agent called tools and continued its turn afterwards."""
    CANCELED = "canceled"
    """A cancel covered the run."""
    ERROR = "error"
    """The agent failed."""
    TIMEOUT = "timeout"
    """The run exceeded its timeout."""
    INTERRUPTED = "interrupted"
    """The node that executed the run was lost and no attempt was left."""
    UNKNOWN = "unknown"
    """A reason of a newer server, unknown to this client."""


class Role(StrEnum):
    """The author of a message."""

    USER = "user"
    """The caller: a prompt."""
    ASSISTANT = "assistant"
    """The agent."""
    TOOL = "tool"
    """The tools called by the agent."""
    UNKNOWN = "unknown"
    """A role of a newer server, unknown to this client."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file or text attached to a prompt.

    `name` and `mime_type` are at most 255 bytes each. An empty `mime_type` means `text/plain` for
    text and `application/octet-stream` for bytes.
    """

    name: str
    content: str | bytes
    mime_type: str = ""


@dataclass(frozen=True, slots=True)
class RunPrompt:
    """The whole prompt of a run, as it is at the revision of `run`.

    `run` is without the text of its RunComplete.
    """

    run: Run
    text: str
    attachments: tuple[Attachment, ...]


@dataclass(frozen=True, slots=True)
class RunError:
    """Why a run failed.

    `reason` is a stable code: AGENT_ERROR, AGENT_NOT_READY, RUN_TIMEOUT, INTERRUPTED, or a code
    chosen by the agent. `message` is for people.
    """

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and model requests used by a run, or by all runs of a session."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    requests: int = 0


@dataclass(frozen=True, slots=True)
class RunComplete:
    """The one terminal event of a run.

    For a folded run, `usage` is None; the run of `folded_into` has it. `message_id` is None for a
    folded run that was cancelled separately. `attempt` is the number of attempts started; 0 if the
    run never started. `result` is the structured result, as JSON; None if the agent gave none.
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
    result: str | None = None


@dataclass(frozen=True, slots=True)
class RunRetryPolicy:
    """Which failures of the agent lead to another attempt of a run, how often and how soon.

    `max_attempts` counts the attempts that the agent may fail, including the first; 2 to 100.
    `reasons` are those of the errors to repeat; none: all but RUN_TIMEOUT and OUTPUT_LIMIT. The
    pause between two attempts begins at `initial_backoff` and doubles up to `max_backoff`. With
    `after_output`, attempts are repeated also after they had emitted something.
    """

    max_attempts: int
    reasons: tuple[str, ...] = ()
    initial_backoff: timedelta = timedelta(seconds=1)
    max_backoff: timedelta = timedelta(minutes=1)
    after_output: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """An accepted prompt. `run_complete` is set in a terminal state; ListRuns omits its text.

    `agent` executes the run. It is empty for a run from before agents had names, and from servers
    of that time. `last_event_index` is that of its last event when it was read. `revision` counts
    its updates while it waited.
    """

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
    retry_policy: RunRetryPolicy | None = None
    agent: str = ""
    last_event_index: int = 0
    revision: int = 0


class RunOrder(StrEnum):
    """The order of a list of runs. Lists by the end leave out runs that have not ended."""

    LATEST_ACCEPTED = "latest-accepted"
    EARLIEST_ACCEPTED = "earliest-accepted"
    LATEST_ENDED = "latest-ended"
    EARLIEST_ENDED = "earliest-ended"


class SessionOrder(StrEnum):
    """The order of a list of sessions."""

    LATEST_CREATED = "latest-created"
    EARLIEST_CREATED = "earliest-created"


@dataclass(frozen=True, slots=True)
class CancelledRun:
    """A run covered by a cancel, with its state when the cancel took effect."""

    session_id: str
    run_id: str
    accept_seq: int
    state_when_cancelled: RunState


@dataclass(frozen=True, slots=True)
class CancelReceipt:
    """The receipt of a cancel for one session.

    `cancelled` is in accept order, and empty if there was nothing to cancel. Runs with an
    accept_seq above `fence_accept_seq` were not affected. `session_id` is empty if the cancel named
    only a run and covered none. `unreadable`: the stored records of the session are damaged, so
    nothing of it was cancelled; deleting the session ends its runs.
    """

    session_id: str
    cancelled: tuple[CancelledRun, ...]
    fence_accept_seq: int
    unreadable: bool = False


# --- Sessions and transcripts --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SessionOrigin:
    """The session that a fork began as a copy of, up to and with a turn."""

    session_id: str
    turn: int


@dataclass(frozen=True, slots=True)
class Session:
    """A conversation: an ordered transcript and one lane of runs.

    `agent` is the agent of its runs that name none; empty: the server's default. `etag` is for
    `Client.update_session`. `origin` is None unless the session is a fork.
    """

    session_id: str
    title: str
    metadata: Mapping[str, str] = field(hash=False)
    busy: bool
    active_run_id: str | None
    waiting_runs: int
    usage: Usage
    created_at: datetime
    updated_at: datetime
    agent: str = ""
    etag: str = ""
    origin: SessionOrigin | None = None


class AgentAbility(StrEnum):
    """Something that the runs of an agent can do."""

    FOLD = "fold"
    """Prompts accepted with FOLD may join a turn."""
    ASK = "ask"
    """It may ask people."""
    STEPS = "steps"
    """It may store results of steps, which later attempts do not repeat."""
    ATTACHMENTS = "attachments"
    """It gets attachments that are not text, such as images."""
    RESUME = "resume"
    """A run that waits for people survives the loss of its node without consuming an attempt."""
    OUTLIVE = "outlive"
    """An active run continues while its node restarts."""
    UNKNOWN = "unknown"
    """An ability of a newer server, unknown to this client."""


@dataclass(frozen=True, slots=True)
class AgentInfo:
    """An agent of the server, with its state on the node that answered.

    Attributes:
        name: The name, for `Client.run_accepted(agent=...)`.
        kind: The kind of agent, such as `command` or `chat`.
        ready: Whether it is ready to execute runs; until then they wait.
        is_default: Whether it executes runs that name no agent.
        slots_in_use: Sessions with an active run of this agent.
        slots_limit: Maximum of `slots_in_use`; None: no limit of its own.
        can: The abilities of its runs; they never do others.
    """

    name: str
    kind: str
    ready: bool
    is_default: bool
    slots_in_use: int
    slots_limit: int | None
    can: tuple[AgentAbility, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The server: its version, empty if it is older than this field, and its agents."""

    version: str
    agents: tuple[AgentInfo, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """A text part."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A part with the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call. `tool_call_id` is unique within the turn; the arguments are a JSON object."""

    tool_call_id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The result of a tool call; an error if the turn ended before the tool returned."""

    tool_call_id: str
    name: str
    content: str
    is_error: bool = False


class ArtifactKind(StrEnum):
    """The kind of content that an artifact has."""

    TEXT = "text"
    """Text."""
    DATA = "data"
    """Bytes."""
    JSON = "json"
    """A JSON value, as text."""
    URI = "uri"
    """The address of content that is kept elsewhere."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """Something that a run made besides its text: whole in a transcript, a piece in an event.

    `content` is bytes for the kind DATA. With `append` it continues that of the earlier pieces with
    the same `artifact_id`; without it the artifact begins. `last`: the artifact is complete.
    """

    artifact_id: str
    name: str
    mime_type: str
    kind: ArtifactKind
    content: str | bytes
    append: bool = False
    last: bool = True


@dataclass(frozen=True, slots=True)
class Result:
    """The structured result of a run, as JSON."""

    json: str


Part: TypeAlias = Text | Reasoning | ToolCall | ToolResult | Attachment | Artifact | Result
"""A part of a message."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a transcript. `turn` counts the turns of the session from 1.

    If `continues` is true, the message continues on the next page under the same id; the iterator
    of `Client.list_messages` joins such messages.
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
        """The joined text parts, without reasoning, tools and attachments."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


# --- Events --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Accepted:
    """The run was accepted."""

    accept_seq: int


@dataclass(frozen=True, slots=True)
class Started:
    """An attempt of the run started.

    With an `attempt` above 1 the run starts over: discard the output of earlier attempts.
    """

    attempt: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the output text, to append to the previous pieces."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """A piece of the model's reasoning, to append to the previous pieces."""

    text: str


@dataclass(frozen=True, slots=True)
class Custom:
    """An event of a type that the agent defines; ignore types that you do not know."""

    type: str
    json: str


@dataclass(frozen=True, slots=True)
class Updated:
    """The waiting run was edited. A move alone is no event.

    `prompt_excerpt` has the first 256 characters of its prompt.
    """

    revision: int
    prompt_excerpt: str
    when_busy: WhenBusy


@dataclass(frozen=True, slots=True)
class Step:
    """The agent finished a step with this result (JSON); later attempts do not repeat it."""

    key: str
    json: str


@dataclass(frozen=True, slots=True)
class Folded:
    """A run joined the turn of another run. Both runs have this event."""

    run_id: str
    into_run_id: str


EventBody: TypeAlias = (
    Accepted
    | Started
    | TextDelta
    | ReasoningDelta
    | ToolCall
    | ToolResult
    | Artifact
    | Custom
    | Step
    | Folded
    | InputRequested
    | InputAnswered
    | InputWithdrawn
    | InputExpired
    | Resumed
    | Updated
    | RunComplete
)
"""The kinds of events of a run."""


@dataclass(frozen=True, slots=True)
class RunEvent:
    """An event of a run. Events are numbered from 1; the last one is the `RunComplete`."""

    index: int
    time: datetime
    body: EventBody


@dataclass(frozen=True, slots=True)
class Progress:
    """A progress mark of an idle subscription: no other matching event exists up to `cursor`."""

    cursor: str
    time: datetime
