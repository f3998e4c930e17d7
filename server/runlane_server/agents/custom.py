"""Agents that users write, specified as `<module>:<attribute>`.

The attribute is one of these:

    async def answer(turn):        # an async generator function, the shortest form
        yield "Hello, "            # text, or any AgentEvent
        yield TextDelta("world")

    agent = pydantic_ai.Agent(...)

    class MyAgent: ...             # a class that implements `Agent` (start, run, close), or an
                                   # instance of one

A class is instantiated without arguments.
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
from runlane_server.core.errors import SettingsError, StartError
from runlane_server.core.model import ReasoningDelta, TextDelta, ToolCall, ToolResult

AnswerFunction: TypeAlias = Callable[[Turn], AsyncGenerator[AgentEvent | str, None]]

_EVENTS = (TextDelta, ReasoningDelta, ToolCall, ToolResult, Report)


class FunctionAgent:
    """The agent made of an async generator function."""

    def __init__(self, function: AnswerFunction) -> None:
        self._function = function

    async def start(self) -> None:
        """Does nothing: the agent is always ready."""

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Yields the events of the function; a string becomes a TextDelta."""
        async with aclosing(self._function(turn)) as events:
            async for event in events:
                yield _to_event(event)

    async def close(self) -> None:
        """Does nothing: there is nothing to free."""


def import_agent(module: str, attribute: str) -> Agent:
    """Imports an agent from a user's module. Raises StartError.

    The working directory comes first on the import path, as with `python -m`.
    """
    directory = str(Path.cwd())
    if directory not in sys.path:
        sys.path.insert(0, directory)
    name = f"{module}:{attribute}"
    return as_agent(name, _import_object(name, module, attribute))


def _import_object(name: str, module: str, attribute: str) -> object:
    try:
        found: object = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError as exc:
        raise SettingsError(f"agent {name}: {_first_line(exc)}") from exc
    except Exception as exc:
        message = f"agent {name}: cannot import: {type(exc).__name__}: {_first_line(exc)}"
        # Other errors come from the module's own code, which may need a service that is down.
        wrong = isinstance(exc, (ImportError, SyntaxError))
        raise (SettingsError(message) if wrong else StartError(message)) from exc
    return found


def as_agent(name: str, found: object) -> Agent:
    """Returns an object as an agent, wrapped or instantiated where needed. Raises StartError, whose
    message begins with `name`."""
    if _is_generator_function(found):
        return FunctionAgent(cast("AnswerFunction", found))
    if "pydantic_ai" in sys.modules:
        from pydantic_ai.agent import AbstractAgent  # noqa: PLC0415 - an optional extra

        if isinstance(found, AbstractAgent):
            from runlane_server.agents.chat.agent import ChatAgent  # noqa: PLC0415

            return ChatAgent(found)
    if isinstance(found, type):
        found = _instantiate(name, found)
    if _is_agent(found):
        return cast("Agent", found)
    raise SettingsError(
        f"agent {name}: a {type(found).__name__} is not an agent; expected an async generator "
        "function, a pydantic_ai.Agent, or an object or class with start, run and close"
    )


def _instantiate(name: str, kind: type) -> object:
    try:
        instance: object = kind()
    except Exception as exc:
        message = f"agent {name}: cannot instantiate the class: {_first_line(exc)}"
        raise StartError(message) from exc
    return instance


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
        # `async def run` without a yield is a coroutine function: its result has no events.
        and not inspect.iscoroutinefunction(run)
    )


def _to_event(event: Any) -> AgentEvent:
    if isinstance(event, str):
        return TextDelta(event)
    if isinstance(event, _EVENTS):
        return event
    message = f"the agent yielded a {type(event).__name__}; expected a string or an AgentEvent"
    raise AgentError(message, reason="BAD_EVENT")


def _first_line(exc: Exception) -> str:
    return str(exc).partition("\n")[0]
