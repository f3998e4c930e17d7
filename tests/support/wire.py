"""What tests do over the wire with a scripted server."""

from __future__ import annotations

import asyncio
import json
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
from support.process import SECONDS


def script(*steps: dict[str, Any]) -> str:
    """A prompt for the scripted agent."""
    return json.dumps(steps)


def say(text: str) -> dict[str, Any]:
    """A step that says something."""
    return {"text": text}


def at_gate(gate: str, **more: Any) -> Sequence[dict[str, Any]]:
    """Steps that say where they are, and wait at a gate."""
    return say(f"<{gate}>"), {"wait": gate, **more}


async def heard(handle: RunHandle, text: str, *, attempt: int = 1) -> str:
    """Returns what a run has said in an attempt as soon as this is part of it."""
    said = ""
    at = 0
    async with asyncio.timeout(SECONDS):
        async for event in handle.events():
            match event.body:
                case Started():
                    at, said = event.body.attempt, ""
                case TextDelta():
                    said += event.body.text
            if at == attempt and text in said:
                return said
    raise AssertionError(f"the run ended without {text!r}, saying {said!r}")


class Wire:
    """A client, and the moves that stage a race."""

    def __init__(self, client: Client) -> None:
        self.client = client

    async def accept(self, session_id: str, *steps: dict[str, Any], **options: Any) -> RunHandle:
        """Accepts a run; the session is created if need be."""
        options.setdefault("allow_missing", True)
        return await self.client.run_accepted(session_id, script(*steps), **options)

    async def blocked(self, session_id: str, gate: str, **options: Any) -> RunHandle:
        """Accepts a run, and returns once it is active and waits at a gate."""
        handle = await self.accept(session_id, *at_gate(gate), **options)
        await self.reached(handle, gate)
        return handle

    async def reached(self, handle: RunHandle, gate: str) -> None:
        """Returns once a run has come to a gate."""
        await heard(handle, f"<{gate}>")

    async def open(self, gate: str) -> None:
        """Opens a gate, by a run in another session."""
        handle = await self.accept(f"opener of {gate}", {"open": gate})
        await handle.completed(SECONDS)

    async def end(self, handle: RunHandle) -> RunComplete:
        """Waits for the end of a run."""
        return await handle.completed(SECONDS)

    async def messages(self, session_id: str) -> list[Message]:
        """The transcript of a session."""
        return [message async for message in self.client.list_messages(session_id)]


def text_of(message: Message) -> str:
    """The text of a message."""
    return "".join(part.text for part in message.parts if isinstance(part, Text))


def check_turn(complete: RunComplete, messages: Sequence[Message]) -> None:
    """What the transcript has of a run agrees with its terminal event (R14 to R16, R22)."""
    turn = [message for message in messages if message.run_id == complete.run_id]
    roles = Counter(message.role for message in turn)
    assert roles[Role.USER] == 1, f"the prompt stands {roles[Role.USER]} times"
    last = [message for message in turn if message.role is Role.ASSISTANT][-1]
    assert last.message_id == complete.message_id
    assert last.finish_reason is complete.finish_reason
    assert text_of(last) == complete.text
    cancelled = complete.state is RunState.CANCELLED
    assert cancelled == (last.finish_reason is FinishReason.CANCELED) == complete.cancelled
