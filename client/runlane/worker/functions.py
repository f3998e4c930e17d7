"""Agents made of functions: async functions run on the event loop, plain ones in threads.

Both kinds may yield events, or return the answer as a whole. A thread cannot be cancelled from
outside: the methods of its turn raise `CancelledError` after a cancel, and code that calls
none of them checks `is_cancelled`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import inspect
import json
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, closing
from functools import partial
from typing import Any, TypeAlias, TypeVar

from runlane.types import Message
from runlane.worker.events import AgentError, AgentEvent, FoldedPrompt
from runlane.worker.turn import Turn

T = TypeVar("T")

AgentFunction: TypeAlias = Callable[[Any], Any]
"""Takes a `Turn` if it is async, else a `BlockingTurn`; yields events or returns the answer."""


class BlockingTurn:
    """A turn for code in a thread: its methods block until the event loop has done the work."""

    def __init__(self, turn: Turn) -> None:
        self.session_id = turn.session_id
        self.run_id = turn.run_id
        self.tenant = turn.tenant
        self.agent = turn.agent
        self.attempt = turn.attempt
        self.prompt = turn.prompt
        self.metadata = turn.metadata
        self.traceparent = turn.traceparent
        self.deadline = turn.deadline
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
        """Asks people; see `Turn.ask`. Raises CancelledError if there is no answer yet and after a
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

    def emit(self, event: AgentEvent | str) -> None:
        """Adds an event to the output. Raises CancelledError after a cancel."""
        self._wait(partial(self._turn.emit, event))

    def cancel(self) -> None:
        """Makes `is_cancelled` true, and all methods raise CancelledError."""
        self._cancelled.set()

    def _wait(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if threading.get_ident() == self._loop_thread:
            raise AgentError("a function that returns a coroutine must be declared with async def")
        if self.is_cancelled:
            raise asyncio.CancelledError
        try:
            return asyncio.run_coroutine_threadsafe(call(), self._loop).result()
        except concurrent.futures.CancelledError:
            # Another class, an Exception, which the function may catch by mistake.
            raise asyncio.CancelledError from None


async def run_function(function: AgentFunction, turn: Turn) -> AsyncGenerator[Any, None]:
    """Yields the events of a function, or what it returns."""
    inner: Any = function
    while isinstance(inner, partial):
        inner = inner.func
    if inspect.isasyncgenfunction(inner) or inspect.iscoroutinefunction(inner):
        result = function(turn)
    else:
        result = await _call_in_thread(function, BlockingTurn(turn))
    if inspect.isasyncgen(result):
        async with aclosing(result) as events:
            async for event in events:
                yield event
        return
    if inspect.isawaitable(result):
        result = await result
    if result is not None:
        yield result


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
        # The slot is in use until the code has returned.
        await asyncio.wait({ended})
        raise
    if error is not None:
        raise error
    return result


def _exhaust(function: AgentFunction, turn: BlockingTurn) -> object:
    """Calls the function and, if it yields, emits all its events."""
    result: Any = function(turn)
    if not inspect.isgenerator(result):
        return result
    events: Any = result
    with closing(events):
        for event in events:
            turn.emit(event)
    return None
