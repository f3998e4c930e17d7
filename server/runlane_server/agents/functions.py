"""Agents made of functions: async functions run on the event loop, plain ones in threads.

Both kinds may yield events, or return the answer as a whole. A thread cannot be cancelled from
outside: the methods of its turn raise `CancelledError` after a cancel, and code that calls
none of them checks `is_cancelled`.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import json
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, closing
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast, get_args

from runlane_server.agents.base import AgentError, AgentEvent, FoldedPrompt, Turn
from runlane_server.core.model import Message, Prompt, TextDelta

T = TypeVar("T")

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

AgentFunction: TypeAlias = Callable[[Any], Any]
"""Takes a `Turn` if it is async, else a `BlockingTurn`; yields events or returns the answer."""

_EVENTS = get_args(AgentEvent)


class BlockingTurn:
    """A turn for code in a thread: its methods block until the event loop has done the work."""

    def __init__(self, turn: Turn) -> None:
        self.tenant: str = turn.tenant
        self.session_id: str = turn.session_id
        self.run_id: str = turn.run_id
        self.attempt: int = turn.attempt
        self.prompt: Prompt = turn.prompt
        self.metadata: Mapping[str, str] = turn.metadata
        self.traceparent: str = turn.traceparent
        self._turn = turn
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._cancelled = threading.Event()

    @property
    def is_cancelled(self) -> bool:
        """Whether the run was stopped; the function must return soon."""
        return self._cancelled.is_set()

    def history(self) -> Sequence[Message]:
        """The transcript before this turn. Raises CancelledError after a cancel."""
        return self._wait(self._turn.history)

    def take_folded(self) -> Sequence[FoldedPrompt]:
        """Takes the prompts that wait to join the turn. Raises CancelledError after a cancel."""
        return self._wait(self._turn.take_folded)

    def step(self, key: str, work: Callable[[], Any]) -> Any:
        """Does the work of a step in this thread unless its result is stored; returns the result.
        See `Turn.step`. Raises CancelledError after a cancel."""
        found = self._wait(partial(self._turn.find_step, key))
        if found is None:
            found = self._wait(partial(self._turn.keep_step, key, work()))
        return json.loads(found)

    def emit(self, event: AgentEvent | str) -> None:
        """Adds an event to the output. Raises CancelledError after a cancel, and AgentError for
        a value that cannot be stored."""
        self._wait(partial(self._turn.emit, event))

    def ask(
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
        """Asks people, and waits for the answer; see `Turn.ask`. Raises CancelledError after a
        cancel, and AgentError."""
        return self._wait(
            partial(
                self._turn.ask,
                text,
                key=key,
                tool_name=tool_name,
                arguments=arguments,
                choices=choices,
                schema=schema,
                timeout=timeout,
                default=default,
            )
        )

    def cancel(self) -> None:
        """Makes `is_cancelled` true, and all methods raise CancelledError."""
        self._cancelled.set()

    def _wait(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if threading.get_ident() == self._loop_thread:
            raise AgentError("a function that returns a coroutine must be declared with async def")
        if self.is_cancelled:
            raise asyncio.CancelledError
        return asyncio.run_coroutine_threadsafe(call(), self._loop).result()


class FunctionAgent:
    """The agent made of a function."""

    def __init__(self, function: AgentFunction) -> None:
        self._function = function
        self.resumable = bool(getattr(_innermost(function), "resumable", False))
        """Whether it may be called again, for another attempt, while it waits for input (R44)."""
        inner = _innermost(function)
        self._is_async = inspect.isasyncgenfunction(inner) or inspect.iscoroutinefunction(inner)

    async def start(self) -> None:
        """Does nothing: the agent is always ready."""

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Yields the events of the function, or what it returns; a string becomes a TextDelta."""
        if self._is_async:
            result = self._function(turn)
        else:
            result = await _call_in_thread(self._function, BlockingTurn(turn))
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
    return inspect.isroutine(_innermost(found))


def as_event(event: object, *, verb: str = "yielded") -> AgentEvent:
    """Returns an event as it is, and a string as a TextDelta. Raises AgentError for the rest."""
    if isinstance(event, str):
        return TextDelta(event)
    if isinstance(event, _EVENTS):
        return cast("AgentEvent", event)
    message = f"the agent {verb} a {type(event).__name__}; expected a string or an AgentEvent"
    raise AgentError(message, reason="BAD_EVENT")


def _innermost(found: object) -> object:
    while isinstance(found, partial):
        found = found.func
    return found


async def _call_in_thread(function: AgentFunction, turn: BlockingTurn) -> object:
    """Calls a function in a daemon thread of its own, and waits until it has returned.

    A thread pool would be a second queue beside the slots, and its threads keep the process alive.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[tuple[object, BaseException | None]] = loop.create_future()
    context = contextvars.copy_context()

    def settle(result: object, error: BaseException | None) -> None:
        if not ended.done():
            ended.set_result((result, error))

    def work() -> None:
        outcome: tuple[object, BaseException | None]
        try:
            outcome = context.run(_exhaust, function, turn), None
        except BaseException as error:  # noqa: BLE001 - it is raised where the agent is awaited
            outcome = None, error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=work, name=f"agent {turn.run_id}", daemon=True).start()
    try:
        result, error = await asyncio.shield(ended)
    except asyncio.CancelledError:
        turn.cancel()
        # The session stays busy until the code has returned (R9).
        await asyncio.wait({ended})
        raise
    if error is not None:
        raise error
    return result


def _exhaust(function: AgentFunction, turn: BlockingTurn) -> object:
    """Calls the function and, if it yields, emits all its events."""
    result = function(turn)
    if not inspect.isgenerator(result):
        return result
    with closing(result):
        for event in result:
            turn.emit(as_event(event))
    return None
