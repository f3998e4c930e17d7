"""The functions that a worker executes; `threads` calls them."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from runlane.types import Message
from runlane.worker.events import FoldedPrompt
from runlane.worker.threads import AgentFunction, ThreadTurn, call_function
from runlane.worker.turn import Turn


class BlockingTurn(ThreadTurn):
    """A turn for code in a thread: its methods block until the event loop has done the work."""

    def __init__(self, turn: Turn) -> None:
        super().__init__(turn)
        self.session_id = turn.session_id
        self.tenant = turn.tenant
        self.agent = turn.agent
        self.attempt = turn.attempt
        self.prompt = turn.prompt
        self.metadata = turn.metadata
        self.traceparent = turn.traceparent
        self.deadline = turn.deadline

    def history(self) -> Sequence[Message]:
        """The transcript before this turn. Raises CancelledError after a cancel."""
        return self._wait(self._turn.history)

    def take_folded(self) -> Sequence[FoldedPrompt]:
        """Takes the prompts that wait to join the turn. Raises CancelledError after a cancel."""
        return self._wait(self._turn.take_folded)


async def run_function(function: AgentFunction, turn: Turn) -> AsyncGenerator[Any, None]:
    """Yields the events of a function, or what it returns."""
    result = await call_function(function, turn, BlockingTurn, _same)
    if inspect.isasyncgen(result):
        async with aclosing(result) as events:
            async for event in events:
                yield event
        return
    if inspect.isawaitable(result):
        result = await result
    if result is not None:
        yield result


def _same(event: object) -> object:
    return event
