"""Agents that users write, specified as `<module>:<attribute>`.

The attribute is one of these:

    async def answer(turn):        # a function that yields, the shortest form
        yield "Hello, "            # text, or any AgentEvent
        yield TextDelta("world")

    async def answer(turn):        # a function that returns the answer
        return "Hello"

    def answer(turn): ...          # either of them without async: it runs in a thread

    agent = pydantic_ai.Agent(...)

    class MyAgent: ...             # a class that implements `Agent` (start, run, close), or an
                                   # instance of one

A class is instantiated without arguments.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

from runlane.worker.reload import Code
from runlane.worker.threads import AgentFunction
from runlane_server.agents.base import Agent
from runlane_server.agents.functions import FunctionAgent, is_function
from runlane_server.agents.reloading import ReloadingAgent
from runlane_server.core.errors import SettingsError, StartError


def import_agent(
    module: str, attribute: str, *, lenient_end: bool = False, reload: bool = False
) -> Agent:
    """Imports an agent from a user's module. Raises StartError.

    With `lenient_end`, the answers of a pydantic_ai.Agent's model may end without a finish reason.
    With `reload`, the module is loaded again when its files change.

    The working directory comes first on the import path, as with `python -m`.
    """
    directory = str(Path.cwd())
    if directory not in sys.path:
        sys.path.insert(0, directory)
    name = f"{module}:{attribute}"
    if reload:
        code = Code(module, attribute)
        return ReloadingAgent(
            code, lambda: as_agent(name, _imported(name, code.load), lenient_end=lenient_end)
        )
    found = _imported(name, partial(_import_object, module, attribute))
    return as_agent(name, found, lenient_end=lenient_end)


def _import_object(module: str, attribute: str) -> object:
    found: object = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _imported(name: str, load: Callable[[], object]) -> object:
    try:
        return load()
    except AttributeError as exc:
        raise SettingsError(f"agent {name}: {_first_line(exc)}") from exc
    except Exception as exc:
        message = f"agent {name}: cannot import: {type(exc).__name__}: {_first_line(exc)}"
        # Other errors come from the module's own code, which may need a service that is down.
        wrong = isinstance(exc, (ImportError, SyntaxError))
        raise (SettingsError(message) if wrong else StartError(message)) from exc


def as_agent(name: str, found: object, *, lenient_end: bool = False) -> Agent:
    """Returns an object as an agent, wrapped or instantiated where needed. Raises StartError, whose
    message begins with `name`."""
    if is_function(found):
        return FunctionAgent(cast("AgentFunction", found))
    if "pydantic_ai" in sys.modules:
        from pydantic_ai.agent import AbstractAgent  # noqa: PLC0415 - an optional extra

        if isinstance(found, AbstractAgent):
            from runlane_server.agents.chat.agent import ChatAgent  # noqa: PLC0415

            return ChatAgent(found, lenient_end=lenient_end)
    if isinstance(found, type):
        found = _instantiate(name, found)
    if _is_agent(found):
        return cast("Agent", found)
    raise SettingsError(
        f"agent {name}: a {type(found).__name__} is not an agent; expected a function, a "
        "pydantic_ai.Agent, or an object or class with start, run and close"
    )


def _instantiate(name: str, kind: type) -> object:
    try:
        instance: object = kind()
    except Exception as exc:
        message = f"agent {name}: cannot instantiate the class: {_first_line(exc)}"
        raise StartError(message) from exc
    return instance


def _is_agent(found: object) -> bool:
    start, run, close = (getattr(found, name, None) for name in ("start", "run", "close"))
    return (
        inspect.iscoroutinefunction(start)
        and inspect.iscoroutinefunction(close)
        and callable(run)
        # `async def run` without a yield is a coroutine function: its result has no events.
        and not inspect.iscoroutinefunction(run)
    )


def _first_line(exc: Exception) -> str:
    return str(exc).partition("\n")[0]
