"""Functions as agents, in workers and in servers: async functions run on the event loop, plain ones
in threads.

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
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, TypeAlias, TypeVar

from runlane.worker.events import AgentError
from runlane.worker.reload import ReloadingFunction

T = TypeVar("T")

AgentFunction: TypeAlias = Callable[[Any], Any]
"""Takes a `Turn` if it is async, else a `BlockingTurn`; yields events or returns the answer."""


class ThreadTurn:
    """A turn for code in a thread: its methods block until the event loop has done the work."""

    def __init__(self, turn: Any) -> None:
        self.run_id: str = turn.run_id
        self._turn = turn
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._cancelled = threading.Event()

    @property
    def is_cancelled(self) -> bool:
        """Whether the run was stopped; the function must return soon."""
        return self._cancelled.is_set()

    def step(self, key: str, work: Callable[[], Any]) -> Any:
        """Does the work of a step in this thread unless its result is stored; returns the result.
        See `Turn.step`. Raises CancelledError after a cancel."""
        found = self._wait(partial(self._turn.find_step, key))
        if found is None:
            found = self._wait(partial(self._turn.keep_step, key, work()))
        return json.loads(found)

    def emit(self, event: Any) -> None:
        """Adds an event to the output; a string is text. Raises CancelledError after a cancel, and
        AgentError for a value that cannot be stored."""
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
        """Asks people, and returns the answer; see `Turn.ask`. Raises CancelledError after a
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
        try:
            return asyncio.run_coroutine_threadsafe(call(), self._loop).result()
        except concurrent.futures.CancelledError:
            # Another class, an Exception, which the function may catch by mistake.
            raise asyncio.CancelledError from None


def innermost(found: object) -> Any:
    """The function within partials of it."""
    while isinstance(found, partial):
        found = found.func
    return found


async def call_function(
    function: AgentFunction,
    turn: Any,
    in_thread: Callable[[Any], ThreadTurn],
    as_event: Callable[[object], Any],
) -> Any:
    """Calls a function. Returns its answer; of an async one a coroutine or an async generator.

    `in_thread` makes the turn of a plain one, and `as_event` checks what that yields.
    """
    if isinstance(function, ReloadingFunction):
        function = function.current()
    inner = innermost(function)
    if inspect.isasyncgenfunction(inner) or inspect.iscoroutinefunction(inner):
        return function(turn)
    return await _call_in_thread(function, in_thread(turn), as_event)


async def _call_in_thread(
    function: AgentFunction, turn: ThreadTurn, as_event: Callable[[object], Any]
) -> object:
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
            outcome = context.run(_exhaust, function, turn, as_event), None
        except BaseException as error:  # noqa: BLE001 - it is raised where the agent is awaited
            outcome = None, error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=work, name=f"agent {turn.run_id}", daemon=True).start()
    try:
        result, error = await asyncio.shield(ended)
    except asyncio.CancelledError:
        turn.cancel()
        # The session, or the slot, is in use until the code has returned (R9).
        await asyncio.wait({ended})
        raise
    if error is not None:
        raise error
    return result


def _exhaust(
    function: AgentFunction, turn: ThreadTurn, as_event: Callable[[object], Any]
) -> object:
    """Calls the function and, if it yields, emits all its events."""
    result: Any = function(turn)
    if not inspect.isgenerator(result):
        return result
    events: Any = result
    with closing(events):
        for event in events:
            turn.emit(as_event(event))
    return None
