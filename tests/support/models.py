"""Shared parts of the tests of agents with a language model."""

from __future__ import annotations

import pytest

from runlane_server.agents.base import Agent, AgentError
from support.turns import LocalTurn, ask, collect

KEY = "sk-secret-0123456789"
"""The key that the provider expects; it must not be seen anywhere else."""


async def failure(agent: Agent, turn: LocalTurn | None = None) -> AgentError:
    """The error of a turn that fails, which has one line without the key."""
    with pytest.raises(AgentError) as failed:
        await collect(agent, turn or ask("hi"))
    assert KEY not in failed.value.message
    assert "\n" not in failed.value.message
    assert len(failed.value.message) <= 300
    return failed.value
