"""A turn without a server, and helpers that run an agent on it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from runlane_server.agents.base import Agent, AgentEvent, FoldedPrompt, Report
from runlane_server.core.model import (
    NO_LABELS,
    Attachment,
    FinishReason,
    Message,
    Origin,
    Part,
    Prompt,
    Role,
    Text,
    TextDelta,
    Usage,
)


@dataclass
class LocalTurn:
    """A turn in memory. Prompts appended to `waiting` are folded in at the next step."""

    prompt: Prompt = field(default_factory=lambda: Prompt(""))
    messages: list[Message] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    session_id: str = "s1"
    run_id: str = "r1"
    attempt: int = 1
    metadata: Mapping[str, str] = field(default_factory=lambda: NO_LABELS)
    traceparent: str = ""
    tenant: str = "default"
    origin: Origin | None = None
    emitted: list[AgentEvent] = field(default_factory=list)
    steps: dict[str, str] = field(default_factory=dict)
    checkpoint: str = ""
    left: list[Any] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)

    async def history(self) -> Sequence[Message]:
        """The messages that the turn was made with."""
        return self.messages

    async def take_folded(self) -> Sequence[FoldedPrompt]:
        """Returns the waiting prompts, each once."""
        taken, self.waiting = self.waiting, []
        return [FoldedPrompt(f"f{n}", Prompt(text)) for n, text in enumerate(taken)]

    async def step(self, key: str, work: Callable[[], Any]) -> Any:
        """Does the work unless `steps` has its result."""
        found = await self.find_step(key)
        return json.loads(found if found is not None else await self.keep_step(key, work()))

    async def find_step(self, key: str) -> str | None:
        """The result in `steps`."""
        return self.steps.get(key)

    async def keep_step(self, key: str, result: object) -> str:
        """Keeps the result in `steps`."""
        return self.steps.setdefault(key, json.dumps(result))

    async def emit(self, event: AgentEvent | str) -> None:
        """Keeps the event in `emitted`."""
        self.emitted.append(TextDelta(event) if isinstance(event, str) else event)

    async def ask(self, text: str, *, key: str = "", **_: Any) -> Any:
        """Returns the prepared answer."""
        return self.answers[key or text]

    async def ask_and_leave(self, questions: Sequence[Any], checkpoint: str) -> bool:
        """Keeps the questions in `left`."""
        self.left += questions
        self.checkpoint = checkpoint
        return True

    async def answer_to(self, key: str) -> Any:
        """Returns the prepared answer."""
        return self.answers[key]


def ask(text: str, *attachments: Attachment, waiting: Sequence[str] = ()) -> LocalTurn:
    """A turn with a prompt."""
    return LocalTurn(Prompt(text, attachments), waiting=list(waiting))


def message(
    turn: int, role: Role, *parts: Part | str, finish_reason: FinishReason | None = None
) -> Message:
    """A message of a transcript. A text stands for a text part."""
    return Message(
        message_id=f"m{turn}",
        run_id=f"r{turn}",
        turn=turn,
        ordinal=0,
        role=role,
        parts=tuple(Text(part) if isinstance(part, str) else part for part in parts),
        finish_reason=finish_reason,
        model="",
        created_at=0,
    )


@asynccontextmanager
async def started(agent: Agent) -> AsyncGenerator[Agent, None]:
    """The agent between its start and its close."""
    await agent.start()
    try:
        yield agent
    finally:
        await agent.close()


async def collect(agent: Agent, turn: LocalTurn) -> list[AgentEvent]:
    """All events of a turn."""
    async with aclosing(agent.run(turn)) as events:
        return [event async for event in events]


def texts(events: Sequence[AgentEvent]) -> list[str]:
    """The text deltas among them."""
    return [event.text for event in events if isinstance(event, TextDelta)]


def usage(events: Sequence[AgentEvent]) -> Usage:
    """The sum of the reported usage."""
    reported = [e.usage for e in events if isinstance(e, Report) and e.usage is not None]
    return sum(reported, start=Usage())


class Working:
    """An agent at work in its own task, started and cancelled as the server does it.

    It keeps all events. `said` returns as soon as the output contains a text.
    """

    def __init__(self, agent: Agent, turn: LocalTurn) -> None:
        self.events: list[AgentEvent] = []
        self._more = asyncio.Event()
        self.task = asyncio.create_task(self._work(agent.run(turn)))

    @property
    def text(self) -> str:
        """The output so far."""
        return "".join(texts(self.events))

    async def said(self, part: str) -> None:
        """Returns when the output contains a text; fails if the agent ends without it."""
        while part not in self.text:
            self._more.clear()
            more = asyncio.ensure_future(self._more.wait())
            await asyncio.wait({self.task, more}, return_when=asyncio.FIRST_COMPLETED)
            if not more.done():
                more.cancel()
                assert part in self.text, f"ended after {self.text!r}: {self.task}"

    async def cancel(self) -> None:
        """Cancels the agent; returns when its code has returned."""
        self.task.cancel()
        await asyncio.wait({self.task})
        assert self.task.cancelled(), self.task

    async def _work(self, running: AsyncGenerator[AgentEvent, None]) -> None:
        async with aclosing(running) as events:
            async for event in events:
                self.events.append(event)
                self._more.set()
