"""Agents that are programs, and ways to have them answer."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from runlane_server.agents.base import AgentError
from runlane_server.agents.command.agent import COMMAND_FAILED, CommandAgent, CommandSettings
from support.turns import LocalTurn, Working, ask, collect, texts

GRACE = 30.0
"""Longer than any test: where it matters that the grace ends, a test sets its own."""


def program(*argv: str, grace: float = GRACE, **settings: Any) -> CommandAgent:
    """An agent that is a program, with what `CommandSettings` takes."""
    return CommandAgent(argv, kill_grace=grace, settings=CommandSettings(**settings))


def python(
    code: str, *, as_json: bool = False, grace: float = GRACE, **settings: Any
) -> CommandAgent:
    """An agent that is a Python program."""
    return CommandAgent(
        [sys.executable, "-c", code],
        as_json=as_json,
        kill_grace=grace,
        settings=CommandSettings(**settings),
    )


def shell(code: str, *, grace: float = GRACE, **settings: Any) -> CommandAgent:
    """An agent that is a shell script."""
    return program("sh", "-c", code, grace=grace, **settings)


async def answer(agent: CommandAgent, turn: LocalTurn | None = None) -> str:
    """What it says to a turn, after which it is closed."""
    try:
        return "".join(texts(await collect(agent, turn or ask(""))))
    finally:
        await agent.close()


async def failure(agent: CommandAgent, reason: str = COMMAND_FAILED) -> str:
    """What it says of a failure, after which it is closed."""
    with pytest.raises(AgentError) as failed:
        await answer(agent)
    assert failed.value.reason == reason
    return failed.value.message


@contextlib.asynccontextmanager
async def at_work(agent: CommandAgent, prompt: str = "") -> AsyncIterator[Working]:
    """The agent at work on a prompt; in the end it is cancelled and closed."""
    working = Working(agent, ask(prompt))
    try:
        yield working
    finally:
        working.task.cancel()
        await asyncio.wait({working.task})
        await agent.close()
