"""Agents that users write, named as `<module>:<attribute>`.

One of these:

    async def answer(turn):        # an async generator function, the shortest of them
        yield "Hello, "            # text, or any AgentEvent
        yield TextDelta("world")

    agent = pydantic_ai.Agent(...)

    class MyAgent: ...             # the Agent protocol: start, run, close; or one made of it

A class is called without arguments.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

from runlane_server.agents.base import Agent, AgentError, AgentEvent, Report, Turn
from runlane_server.core.errors import StartError
from runlane_server.core.model import ReasoningDelta, TextDelta, ToolCall, ToolResult

AnswerFunction: TypeAlias = Callable[[Turn], AsyncGenerator[AgentEvent | str, None]]

_EVENTS = (TextDelta, ReasoningDelta, ToolCall, ToolResult, Report)


class FunctionAgent:
    """Serves an async generator function."""

    def __init__(self, function: AnswerFunction) -> None:
        self._function = function

    async def start(self) -> None:
        """Is ready at once."""

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Yields what the function yields, text as TextDelta."""
        async with aclosing(self._function(turn)) as events:
            async for event in events:
                yield _event(event)

    async def close(self) -> None:
        """Has nothing to free."""


def import_agent(module: str, attribute: str) -> Agent:
    """The agent that a user's module has. Raises StartError.

    The working directory comes first in what can be imported, as with `python -m`.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    name = f"{module}:{attribute}"
    return as_agent(name, _imported(name, module, attribute))


def _imported(name: str, module: str, attribute: str) -> object:
    try:
        found: object = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError as exc:
        raise StartError(f"agent {name}: {_line(exc)}") from exc
    except Exception as exc:
        message = f"agent {name}: cannot import: {type(exc).__name__}: {_line(exc)}"
        raise StartError(message) from exc
    return found


def as_agent(name: str, found: object) -> Agent:
    """The agent that an object is, or is made into; `name` is for errors. Raises StartError."""
    if _is_generator_function(found):
        return FunctionAgent(cast("AnswerFunction", found))
    if "pydantic_ai" in sys.modules:
        from pydantic_ai.agent import AbstractAgent  # noqa: PLC0415 - an optional extra

        if isinstance(found, AbstractAgent):
            from runlane_server.agents.chat.agent import ChatAgent  # noqa: PLC0415

            return ChatAgent(found)
    if isinstance(found, type):
        found = _made(name, found)
    if _is_agent(found):
        return cast("Agent", found)
    raise StartError(
        f"agent {name}: is a {type(found).__name__}, and not an async generator function, "
        "a pydantic_ai.Agent, or an object or class with start, run and close"
    )


def _made(name: str, kind: type) -> object:
    try:
        made: object = kind()
    except Exception as exc:
        raise StartError(f"agent {name}: cannot make one: {_line(exc)}") from exc
    return made


def _is_generator_function(found: object) -> bool:
    while isinstance(found, partial):
        found = found.func
    return inspect.isasyncgenfunction(found)


def _is_agent(found: object) -> bool:
    start, run, close = (getattr(found, name, None) for name in ("start", "run", "close"))
    return (
        inspect.iscoroutinefunction(start)
        and inspect.iscoroutinefunction(close)
        and callable(run)
        # `async def run` without a yield is a coroutine, which nothing can be read from.
        and not inspect.iscoroutinefunction(run)
    )


def _event(event: Any) -> AgentEvent:
    if isinstance(event, str):
        return TextDelta(event)
    if isinstance(event, _EVENTS):
        return event
    message = f"the agent yielded a {type(event).__name__}, which is neither text nor an event"
    raise AgentError(message, reason="BAD_EVENT")


def _line(exc: Exception) -> str:
    return str(exc).partition("\n")[0]
