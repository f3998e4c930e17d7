"""Agents made of functions; `runlane.worker.threads` calls them, as in a worker."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar, cast, get_args

from runlane.worker.threads import AgentFunction, ThreadTurn, call_function, innermost
from runlane_server.agents.base import AgentError, AgentEvent, FoldedPrompt, Turn
from runlane_server.core.model import Message, Origin, Prompt, TextDelta

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

_EVENTS = get_args(AgentEvent)


class BlockingTurn(ThreadTurn):
    """A turn for code in a thread: its methods block until the event loop has done the work."""

    def __init__(self, turn: Turn) -> None:
        super().__init__(turn)
        self.tenant: str = turn.tenant
        self.session_id: str = turn.session_id
        self.attempt: int = turn.attempt
        self.prompt: Prompt = turn.prompt
        self.metadata: Mapping[str, str] = turn.metadata
        self.traceparent: str = turn.traceparent
        self.origin: Origin | None = turn.origin

    def history(self) -> Sequence[Message]:
        """The transcript before this turn. Raises CancelledError after a cancel."""
        return self._wait(self._turn.history)

    def take_folded(self) -> Sequence[FoldedPrompt]:
        """Takes the prompts that wait to join the turn. Raises CancelledError after a cancel."""
        return self._wait(self._turn.take_folded)


class FunctionAgent:
    """The agent made of a function."""

    def __init__(self, function: AgentFunction) -> None:
        self._function = function
        self.resumable = bool(getattr(innermost(function), "resumable", False))
        """Whether it may be called again, for another attempt, while it waits for input (R44)."""

    async def start(self) -> None:
        """Does nothing: the agent is always ready."""

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Yields the events of the function, or what it returns; a string becomes a TextDelta."""
        result = await call_function(self._function, turn, BlockingTurn, as_event)
        if inspect.isasyncgen(result):
            async with aclosing(result) as events:
                async for event in events:
                    yield as_event(event)
            return
        if inspect.isawaitable(result):
            result = await result
        if result is not None:
            yield as_event(result, verb="returned")

    async def close(self) -> None:
        """Does nothing: there is nothing to free."""


def resumable(function: FunctionT) -> FunctionT:
    """Declares that a function may be called again while it waits for input: everything that it
    does before a question may happen twice (R44). Then a lost node costs no attempt."""
    function.resumable = True  # type: ignore[attr-defined]
    return function


def is_function(found: object) -> bool:
    """Whether an object is a function, a method, or a partial of one."""
    return inspect.isroutine(innermost(found))


def as_event(event: object, *, verb: str = "yielded") -> AgentEvent:
    """Returns an event as it is, and a string as a TextDelta. Raises AgentError for the rest."""
    if isinstance(event, str):
        return TextDelta(event)
    if isinstance(event, _EVENTS):
        return cast("AgentEvent", event)
    message = f"the agent {verb} a {type(event).__name__}; expected a string or an AgentEvent"
    raise AgentError(message, reason="BAD_EVENT")
