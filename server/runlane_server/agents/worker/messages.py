"""What goes down a stream to a worker."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from runlane_server.agents.base import FoldedPrompt
from runlane_server.agents.worker.turn import DurableTurn
from runlane_server.core.model import Message


@dataclass(frozen=True, slots=True)
class Assigned:
    """A turn to execute, for one of the agents that the worker offered."""

    turn: DurableTurn
    agent: str


@dataclass(frozen=True, slots=True)
class Acked:
    """Events up to `number` are durable. `ended`: the end of the turn too."""

    number: int
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Joined:
    """Prompts that joined the turn, as the answer to the request `number`; 0 for none."""

    number: int
    prompts: Sequence[FoldedPrompt]


@dataclass(frozen=True, slots=True)
class Stopped:
    """A cancel or a timeout stops the turn."""


@dataclass(frozen=True, slots=True)
class Fenced:
    """The attempt does not belong to the worker any more."""

    message: str


@dataclass(frozen=True, slots=True)
class Transcript:
    """The transcript before the turn."""

    messages: Sequence[Message]


Down: TypeAlias = Assigned | Acked | Joined | Stopped | Fenced | Transcript


class Downstream:
    """The messages that a worker has not taken yet.

    Acknowledgements are merged, so a worker that never reads takes no memory.
    """

    def __init__(self) -> None:
        self._waiting: deque[Down] = deque()
        self._due = asyncio.Event()
        self._error: Exception | None = None
        self._is_closed = False

    def put(self, message: Down) -> None:
        """Adds a message."""
        last = self._waiting[-1] if self._waiting else None
        if isinstance(message, Acked) and isinstance(last, Acked) and not last.ended:
            self._waiting.pop()
        self._waiting.append(message)
        self._due.set()

    def close(self, error: Exception | None = None) -> None:
        """Ends the stream after the messages so far, with an error if there is one."""
        self._is_closed = True
        self._error = self._error or error
        self._due.set()

    async def messages(self) -> AsyncIterator[Down]:
        """Yields the messages as they come. Raises the error of `close`."""
        while True:
            while self._waiting:
                yield self._waiting.popleft()
            if self._is_closed:
                break
            self._due.clear()
            await self._due.wait()
        if self._error is not None:
            raise self._error
