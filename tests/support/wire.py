"""Stages runs on a server with the scripted agent, through the public client."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

from runlane import (
    Client,
    FinishReason,
    Message,
    Role,
    RunComplete,
    RunHandle,
    RunState,
    Started,
    Text,
    TextDelta,
)
from support.staging import SECONDS, Step, at_latch, open_latch, script


async def wait_for_text(handle: RunHandle, text: str, *, attempt: int = 1) -> str:
    """Waits until the output of an attempt contains `text`; returns the output so far."""
    output = ""
    current = 0
    async with asyncio.timeout(SECONDS):
        async for event in handle.events():
            match event.body:
                case Started():
                    current, output = event.body.attempt, ""
                case TextDelta():
                    output += event.body.text
            if current == attempt and text in output:
                return output
    raise AssertionError(f"the run ended without {text!r}; its output was {output!r}")


class Wire:
    """A client, and the calls by which tests stage races."""

    def __init__(self, client: Client) -> None:
        self.client = client

    async def accept(self, session_id: str, *steps: Step, **options: Any) -> RunHandle:
        """Accepts a run; creates the session if it does not exist."""
        options.setdefault("allow_missing", True)
        return await self.client.run_accepted(session_id, script(*steps), **options)

    async def start_blocked(self, session_id: str, latch: str, **options: Any) -> RunHandle:
        """Accepts a run; returns once it is active and waits at a latch."""
        handle = await self.accept(session_id, *at_latch(latch), **options)
        await self.wait_for_latch(handle, latch)
        return handle

    async def wait_for_latch(self, handle: RunHandle, latch: str) -> None:
        """Returns once a run waits at a latch."""
        await wait_for_text(handle, f"<{latch}>")

    async def open_latch(self, latch: str) -> None:
        """Opens a latch, by a run in another session."""
        handle = await self.accept(f"opener of {latch}", open_latch(latch))
        await handle.completed(SECONDS)

    async def end(self, handle: RunHandle) -> RunComplete:
        """Waits for the end of a run; returns its terminal event."""
        return await handle.completed(SECONDS)

    async def messages(self, session_id: str) -> list[Message]:
        """The transcript of a session."""
        return [message async for message in self.client.list_messages(session_id)]


def text_of(message: Message) -> str:
    """The text of a message."""
    return "".join(part.text for part in message.parts if isinstance(part, Text))


def check_turn(complete: RunComplete, messages: Sequence[Message]) -> None:
    """Checks that the transcript of a run agrees with its terminal event (R14 to R16, R22)."""
    turn = [message for message in messages if message.run_id == complete.run_id]
    roles = Counter(message.role for message in turn)
    assert roles[Role.USER] == 1, f"the prompt is in the transcript {roles[Role.USER]} times"
    last = [message for message in turn if message.role is Role.ASSISTANT][-1]
    assert last.message_id == complete.message_id
    assert last.finish_reason is complete.finish_reason
    assert text_of(last) == complete.text
    cancelled = complete.state is RunState.CANCELLED
    assert cancelled == (last.finish_reason is FinishReason.CANCELED) == complete.cancelled
