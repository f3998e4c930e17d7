"""What an agent is: it takes a turn and yields what happens in it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from runlane_server.core.model import (
    FinishReason,
    Message,
    Prompt,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolResult,
    Usage,
)


@dataclass(frozen=True, slots=True)
class Report:
    """What an agent tells about its turn. The last value of each field that is not None counts;
    usage is added up."""

    usage: Usage | None = None
    model: str | None = None
    finish_reason: FinishReason | None = None


AgentEvent: TypeAlias = TextDelta | ReasoningDelta | ToolCall | ToolResult | Report
"""What an agent yields. It calls its tools itself, and tells of the calls and their results."""


@dataclass(frozen=True, slots=True)
class FoldedPrompt:
    """The prompt of a run that joined the turn."""

    run_id: str
    prompt: Prompt


class Turn(Protocol):
    """What an agent is given to work on."""

    @property
    def session_id(self) -> str:
        """The session."""

    @property
    def run_id(self) -> str:
        """The run."""

    @property
    def attempt(self) -> int:
        """Which attempt this is, from 1."""

    @property
    def prompt(self) -> Prompt:
        """What to do."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """The caller's labels."""

    @property
    def traceparent(self) -> str:
        """Where in a trace this is, to be sent along with requests (W3C Trace Context); empty for
        no trace."""

    async def history(self) -> Sequence[Message]:
        """The transcript before this turn, the oldest message first."""

    async def take_folded(self) -> Sequence[FoldedPrompt]:
        """Takes the prompts that wait to join this turn. To be called between two steps.

        Prompts that are taken belong to the turn: the agent answers them too (R26).
        """


class Agent(Protocol):
    """Executes runs, many at a time.

    A turn is cancelled by cancelling the task that iterates over `run`: `asyncio.CancelledError` is
    raised where it awaits. It cleans up in `finally`, and returns soon; after the server's
    `--cancel-grace` it is fenced off, and what it yields is ignored. An exception fails the run.
    """

    async def start(self) -> None:
        """Gets ready to run; returns when it is. Raises if it cannot be (it is tried again)."""

    def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Works on a turn. An async generator function fits; it is closed by `aclose`."""

    async def close(self) -> None:
        """Frees what `start` took. No run is active any more."""


class AgentError(Exception):
    """A failure that an agent explains: a stable word of its own, and a sentence."""

    def __init__(self, message: str, *, reason: str = "AGENT_ERROR") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
