"""Steps of an agent: each is done once per run, over all attempts (R39)."""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from runlane.worker.events import AgentError


class Journal(Protocol):
    """The results of steps."""

    def find_step(self, key: str) -> Awaitable[str | None]:
        """The stored result of a key as JSON, None if there is none."""
        ...

    def keep_step(self, key: str, result: object) -> Awaitable[str]:
        """Makes a result durable; returns as JSON the first one that was stored for its key."""
        ...


async def take_step(journal: Journal, key: str, work: Callable[[], Any], working: set[str]) -> Any:
    """Does the work of a step unless its result is stored. Returns the result.

    `working` are the keys of the attempt whose work is being done. Raises AgentError for one of
    them, and what the work raises.
    """
    found = await journal.find_step(key)
    if found is not None:
        return json.loads(found)
    if key in working:
        raise AgentError(f"step {key!r} is at work already; give each step a key of its own")
    working.add(key)
    try:
        result = work()
        if inspect.isawaitable(result):
            result = await result
        return json.loads(await journal.keep_step(key, result))
    finally:
        working.discard(key)
