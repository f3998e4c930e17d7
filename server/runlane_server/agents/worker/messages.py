"""The messages from the server to a worker."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from runlane_server.agents.base import FoldedPrompt
from runlane_server.agents.worker.turn import DurableTurn
from runlane_server.core.artifact import ArtifactPiece
from runlane_server.core.input import InputRequest
from runlane_server.core.model import (
    Attachment,
    KeptPart,
    Message,
    Part,
    Prompt,
    Reasoning,
    ResultPart,
    Text,
    ToolCall,
    ToolResult,
    utf8_size,
)

MAX_WAITING = 100
"""Messages that wait for a worker before the server reads no more of what it sends."""

MAX_WAITING_BYTES = 1 << 20
"""The same in bytes of prompts and transcripts. One larger message may wait."""


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


@dataclass(frozen=True, slots=True)
class Answered:
    """The answered questions of an ask."""

    requests: Sequence[InputRequest]


@dataclass(frozen=True, slots=True)
class Parked:
    """The run waits for people; the turn is over for the worker."""


@dataclass(frozen=True, slots=True)
class FoundStep:
    """The stored result of a step as JSON, None if there is none."""

    key: str
    result: str | None


Down: TypeAlias = (
    Assigned | Acked | Joined | Stopped | Fenced | Transcript | Answered | Parked | FoundStep
)


class Downstream:
    """The messages that a worker has not taken yet.

    Acknowledgements are merged, and `until_room` holds back a caller that asks for more answers: a
    worker that never reads takes little memory.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Down, int]] = deque()
        self._bytes = 0
        self._due = asyncio.Event()
        self._has_gone = asyncio.Event()
        self._error: Exception | None = None
        self._is_closed = False

    def put(self, message: Down) -> None:
        """Adds a message."""
        last = self._waiting[-1][0] if self._waiting else None
        if isinstance(message, Acked) and isinstance(last, Acked) and not last.ended:
            self._waiting.pop()
        size = _size(message)
        self._waiting.append((message, size))
        self._bytes += size
        self._due.set()

    def has_history(self) -> bool:
        """Whether a transcript waits."""
        return any(isinstance(one, Transcript) for one, _ in self._waiting)

    def has_folded(self) -> bool:
        """Whether the answer to a request for folded prompts waits."""
        return any(isinstance(one, Joined) and one.number > 0 for one, _ in self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether more waits than the worker may ask for."""
        return len(self._waiting) > MAX_WAITING or self._bytes > MAX_WAITING_BYTES

    async def until_room(self) -> None:
        """Waits while more than `MAX_WAITING` messages or `MAX_WAITING_BYTES` wait."""
        while self.is_full:
            self._has_gone.clear()
            await self._has_gone.wait()

    def close(self, error: Exception | None = None) -> None:
        """Ends the stream after the messages so far, with an error if there is one."""
        self._is_closed = True
        self._error = self._error or error
        self._due.set()

    async def messages(self) -> AsyncIterator[Down]:
        """Yields the messages as they come. Raises the error of `close`."""
        while True:
            while self._waiting:
                message, size = self._waiting.popleft()
                yield message
                # It takes memory until all of it is written.
                self._bytes -= size
                self._has_gone.set()
            if self._is_closed:
                break
            self._due.clear()
            await self._due.wait()
        if self._error is not None:
            raise self._error


def _size(message: Down) -> int:
    match message:
        case Assigned(turn):
            return _prompt_size(turn.prompt)
        case Joined(_, prompts):
            return sum(_prompt_size(one.prompt) for one in prompts)
        case Transcript(messages):
            return sum(_part_size(part) for one in messages for part in one.parts)
        case Answered(requests):
            return sum(utf8_size(one.answer.value_json) for one in requests if one.answer)
        case FoundStep(_, result):
            return utf8_size(result or "")
        case _:
            return 0


def _prompt_size(prompt: Prompt) -> int:
    return utf8_size(prompt.text) + sum(one.size for one in prompt.attachments)


def _part_size(part: Part) -> int:
    match part:
        case Text(text) | Reasoning(text) | ResultPart(text):
            return utf8_size(text)
        case ToolCall(_, _, content) | ToolResult(_, _, content):
            return utf8_size(content)
        case Attachment() | ArtifactPiece() | KeptPart():
            return part.size
