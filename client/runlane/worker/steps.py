"""Steps of an agent: each is done once per run, over all attempts (R39)."""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable
from typing import Any

from runlane.worker.events import AgentError


class Steps:
    """The steps of one attempt. `find` returns the stored result of a key as JSON, and `keep` makes
    one durable and returns it as JSON."""

    def __init__(
        self,
        find: Callable[[str], Awaitable[str | None]],
        keep: Callable[[str, object], Awaitable[str]],
    ) -> None:
        self._find = find
        self._keep = keep
        self._working: set[str] = set()

    async def step(self, key: str, work: Callable[[], Any]) -> Any:
        """Does the work of a step unless its result is stored. Returns the result."""
        found = await self._find(key)
        if found is not None:
            return json.loads(found)
        if key in self._working:
            raise AgentError(f"step {key!r} is at work already; give each step a key of its own")
        self._working.add(key)
        try:
            result = work()
            if inspect.isawaitable(result):
                result = await result
            return json.loads(await self._keep(key, result))
        finally:
            self._working.discard(key)
