"""The interface of an agent: it receives a turn and yields the events of that turn."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

# What a function emits and raises is the same in a worker.
from runlane.worker.events import AgentError, Artifact, Custom, Result
from runlane.worker.questions import Approval
from runlane_server.core.model import (
    FinishReason,
    Message,
    Origin,
    Prompt,
    ReasoningDelta,
    SessionKey,
    TextDelta,
    ToolCall,
    ToolResult,
    Usage,
)

__all__ = [
    "Agent",
    "AgentError",
    "AgentEvent",
    "Approval",
    "Artifact",
    "Custom",
    "FoldedPrompt",
    "KeepsSessions",
    "Report",
    "Result",
    "Turn",
]


@dataclass(frozen=True, slots=True)
class Report:
    """Facts about a turn as a whole.

    An agent may yield several: usage is summed up, and of the other fields the last value that is
    not None counts.
    """

    usage: Usage | None = None
    model: str | None = None
    finish_reason: FinishReason | None = None


AgentEvent: TypeAlias = (
    TextDelta | ReasoningDelta | ToolCall | ToolResult | Artifact | Custom | Result | Report
)
"""An event of a turn. The agent calls its tools itself, and reports the calls and results."""


@dataclass(frozen=True, slots=True)
class FoldedPrompt:
    """The prompt of a run that joined the turn."""

    run_id: str
    prompt: Prompt


class Turn(Protocol):
    """The input of an agent: one turn of a session's transcript."""

    @property
    def tenant(self) -> str:
        """The tenant of the session."""

    @property
    def session_id(self) -> str:
        """The session."""

    @property
    def run_id(self) -> str:
        """The run that this turn executes."""

    @property
    def attempt(self) -> int:
        """The number of this attempt at the run, from 1."""

    @property
    def prompt(self) -> Prompt:
        """The prompt to answer."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """The caller's labels."""

    @property
    def traceparent(self) -> str:
        """The span of this attempt, to be sent along with requests (W3C Trace Context); empty if
        the run is in no trace."""

    @property
    def origin(self) -> Origin | None:
        """The origin of a forked session; None if it is none. An agent with a memory of its own
        that does not know the session yet may begin with what it knows of the origin."""

    async def history(self) -> Sequence[Message]:
        """The transcript before this turn, the oldest message first.

        Of a transcript larger than the server's `--max-history` it has the latest turns.
        """

    async def take_folded(self) -> Sequence[FoldedPrompt]:
        """Takes the prompts that wait to join the turn. Call it between two steps.

        A prompt that was taken belongs to the turn: the agent must answer it too (R26).
        """

    async def step(self, key: str, work: Callable[[], Any]) -> Any:
        """Does a piece of work once per run, even if an attempt is repeated (R39).

        Calls `work`, a function or a coroutine function without arguments, makes its result durable
        and returns it; if an earlier attempt of this run stored a result for the key, returns that
        one without calling `work`. The result is any value that JSON has, at most 1 MiB of it, and
        is returned as JSON reads it: a tuple comes back as a list. A key has 1 to 128 bytes.

        An attempt that is lost while `work` is at work, or before its result is stored, does it
        again: make it safe to repeat. Raises what `work` raises; nothing is stored then.
        """

    async def find_step(self, key: str) -> str | None:
        """The stored result of a step as JSON, None if there is none. `step` is made of this and
        of `keep_step`."""

    async def keep_step(self, key: str, result: object) -> str:
        """Makes the result of a step durable; returns as JSON the first one that was stored."""

    async def emit(self, event: AgentEvent | str) -> None:
        """Adds an event to the output, as if the agent had yielded it; a string is text.

        It waits while too much of the output is not stored. After the turn has ended or was
        stopped, the event is dropped. Raises AgentError for a value that cannot be stored.
        """

    async def ask(
        self,
        text: str,
        *,
        key: str = "",
        tool_name: str = "",
        arguments: Mapping[str, Any] | None = None,
        choices: Sequence[str] = (),
        schema: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        default: Any = None,
    ) -> Any:
        """Asks people, and waits for the answer; meanwhile the run needs no slot (R40).

        With `tool_name` it asks for an approval and returns an `Approval`; with `choices` it
        returns one of them, with `schema` (JSON Schema) an object that matches it, otherwise a
        text. A later attempt that asks with the same key gets the same answer, and nobody is asked
        twice (R44); without a `key` the question itself is the key. After `timeout` seconds the
        `default` is the answer; without one the run fails with INPUT_EXPIRED (R43). Raises
        AgentError for a question that nobody can answer, and for too many.
        """

    async def ask_and_leave(self, questions: Sequence[Any], checkpoint: str) -> bool:
        """Asks people, and ends this call of the agent, which must return now; unless the result
        is False: then all is answered already.

        When all is answered the agent is called again for the same attempt, on any node, with the
        `checkpoint` and the `answers`; its output so far stays. `questions` are `Asked` records of
        `agents.questions`. Meanwhile the run costs neither a task nor a slot.
        """

    @property
    def checkpoint(self) -> str:
        """The checkpoint of the agent, if it is called again after `ask_and_leave`; else empty."""

    async def answer_to(self, key: str) -> Any:
        """The answer to a question that the agent has left with."""


class Agent(Protocol):
    """Executes runs, many at a time.

    The server cancels a turn by cancelling the task that iterates over `run`, so
    `asyncio.CancelledError` is raised where the agent awaits. The agent cleans up in `finally` and
    returns soon; after the server's `--cancel-grace` it is fenced off, and what it yields is
    ignored. An exception fails the run.
    """

    async def start(self) -> None:
        """Prepares the agent; returns when it is ready. If it raises, the server retries."""

    def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Executes a turn, usually as an async generator function. The server closes the generator
        with `aclose`."""

    async def close(self) -> None:
        """Frees what `start` acquired. No run is active any more."""


@runtime_checkable
class KeepsSessions(Protocol):
    """An agent that keeps something for each session. An `Agent` may have this method too."""

    def session_deleted(self, key: SessionKey) -> None:
        """Removes it: the session was deleted on this node. It runs on the event loop, before a
        session of the same name can have a run. An exception is logged."""
