"""The dependencies that the tools of a pydantic-ai agent get from the turn."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic_ai.agent import AbstractAgent

from runlane_server.agents.base import AgentError, Turn


async def deps_of(agent: AbstractAgent[Any, Any], turn: Turn) -> Any:
    """The `deps` of an agent: the turn itself if its `deps_type` is `Turn`, what the `from_turn` of
    the type makes of the turn if it has one, else None. Raises AgentError."""
    kind = agent.deps_type
    if kind is Turn:
        return turn
    make = getattr(kind, "from_turn", None)
    if make is None:
        return None
    try:
        made = make(turn)
        return await made if inspect.isawaitable(made) else made
    except Exception as exc:
        name = getattr(kind, "__name__", str(kind))
        raise AgentError(f"{name}.from_turn failed: {type(exc).__name__}: {exc}") from exc
