"""Agents that are programs, and helpers that run them."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from runlane_server.agents.base import AgentError
from runlane_server.agents.command.agent import CommandAgent
from runlane_server.agents.command.programs import COMMAND_FAILED, CommandSettings
from support.turns import LocalTurn, Working, ask, collect, texts

GRACE = 30.0
"""Longer than any test. A test about the end of the grace period sets its own."""


def program(*argv: str, grace: float = GRACE, **settings: Any) -> CommandAgent:
    """An agent that runs a program. Options are those of `CommandSettings`."""
    return CommandAgent(argv, kill_grace=grace, settings=CommandSettings(**settings))


def python(
    code: str, *, as_json: bool = False, grace: float = GRACE, **settings: Any
) -> CommandAgent:
    """An agent that runs Python source."""
    return CommandAgent(
        [sys.executable, "-c", code],
        as_json=as_json,
        kill_grace=grace,
        settings=CommandSettings(**settings),
    )


def shell(code: str, *, grace: float = GRACE, **settings: Any) -> CommandAgent:
    """An agent that runs a shell script."""
    return program("sh", "-c", code, grace=grace, **settings)


async def answer(agent: CommandAgent, turn: LocalTurn | None = None) -> str:
    """Runs a turn and closes the agent; returns the output."""
    try:
        return "".join(texts(await collect(agent, turn or ask(""))))
    finally:
        await agent.close()


async def failure(agent: CommandAgent, reason: str = COMMAND_FAILED) -> str:
    """Runs a turn that fails and closes the agent; returns the error text."""
    with pytest.raises(AgentError) as failed:
        await answer(agent)
    assert failed.value.reason == reason
    return failed.value.message


@contextlib.asynccontextmanager
async def at_work(agent: CommandAgent, prompt: str = "") -> AsyncIterator[Working]:
    """The agent at work on a prompt; it is cancelled and closed at the end."""
    working = Working(agent, ask(prompt))
    try:
        yield working
    finally:
        working.task.cancel()
        await asyncio.wait({working.task})
        await agent.close()
